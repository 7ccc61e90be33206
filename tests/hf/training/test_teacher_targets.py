"""``lens-kernels cache`` stores sparse targets, which replace the teacher in training."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from lens_kernels.cli import main
from lens_kernels.hf import LensDistillConfig
from lens_kernels.hf.cache import logprobs
from lens_kernels.hf.cache.key import CacheKey, counted_positions
from lens_kernels.hf.cache.sampling import sample
from lens_kernels.hf.cache.targets import TargetCache
from lens_kernels.hf.model.loading import load_model, load_tokenizer
from lens_kernels.hf.training.data import load_examples
from tests.support import tiny
from tests.support.training import STUDENT, TEACHER, InOrder, logged, make_trainer

SPARSE = {"teacher": False, "num_lens_pairs": 0, "final_divergence": "forward_kl"}


@pytest.fixture(scope="module")
def world(files, tmp_path_factory):
    """Return a folder for targets, the data, the tokenizer and the teacher, as a namespace."""
    tokenizer = load_tokenizer(str(files / "teacher"), False)
    lengths = {"max_length": 512, "max_prompt_length": 256}
    data = load_examples(str(files / "train.jsonl"), tokenizer, prompt_style="alpaca", **lengths)
    teacher = load_model(str(files / "teacher"))
    folder = tmp_path_factory.mktemp("targets")
    return SimpleNamespace(folder=folder, data=data, tokenizer=tokenizer, teacher=teacher)


def make(files, folder, kind, *options):
    paths = ["--data", str(files / "train.jsonl"), "--output", str(folder)]
    return main(["cache", "--kind", kind, *paths, *map(str, options)])


def opened(world, name):
    key = CacheKey.of(None, world.data, (), world.tokenizer)
    return TargetCache.read(world.folder / name / "train", key)


def probabilities(world):
    """Return the teacher's probabilities at the positions that the loss counts, of all examples."""
    rows = []
    for i in range(len(world.data)):
        example = world.data[i]
        ids = torch.as_tensor(example["input_ids"])[None]
        with torch.no_grad():
            p = world.teacher(ids).logits[0].softmax(-1)
        rows.append(p[counted_positions(example["labels"])])
    return torch.cat(rows)


@pytest.fixture(scope="module")
def sampled(files, world):
    assert make(files, world.folder / "sampled", "sampled", "--teacher", files / "teacher") == 0
    return opened(world, "sampled")


def test_samples_have_the_teachers_distribution(world, sampled):
    targets, p = sampled.targets(range(len(world.data))), probabilities(world)
    assert targets.rest is None and len(sampled) == len(world.data)
    assert targets.token_ids.shape[0] == len(p)
    torch.testing.assert_close(targets.probabilities.sum(-1), torch.ones(len(p)))
    t = torch.zeros_like(p).scatter_add(1, targets.token_ids, targets.probabilities)
    # The standard deviation of the mean over positions is sqrt(p (1 - p) / number of draws).
    error = (t - p).mean(0).abs()
    deviation = (p * (1 - p)).mean(0).div(50 * len(p)).sqrt()
    assert (error < 5 * deviation + 1e-6).all()


def test_importance_weights_restore_the_teachers_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 30, generator=generator).mul(2)
    made = sample(logits.expand(4000, -1), 20, 1.6, generator)
    rows = torch.arange(4000).repeat_interleave(made["sizes"])
    p = made["draws"] * made["weights"] / 20
    t = torch.zeros(4000, 30).index_put((rows, made["ids"].long()), p, accumulate=True)
    exact = logits.softmax(-1)[0]
    assert (t.mean(0) - exact).abs().max() < 5 * t.std(0).max() / 4000**0.5
    # at a single position, the weighted draws sum to 1 only on average
    assert (t.sum(-1) - 1).abs().max() > 1e-3


def test_the_most_probable_tokens(files, world):
    options = ("--top_k", 5, "--rest", "renormalize", "--teacher", files / "teacher")
    assert make(files, world.folder / "topk", "topk", *options) == 0
    targets = opened(world, "topk").targets([0, 1])
    top = probabilities(world)[: len(targets.token_ids)].topk(5)
    assert targets.rest == "renormalize" and torch.equal(targets.token_ids, top.indices)
    torch.testing.assert_close(targets.probabilities, top.values)


def test_a_build_is_checked_and_repeatable(files, world, sampled, capsys):
    options = ("--teacher", files / "teacher")
    assert make(files, world.folder / "again", "sampled", *options) == 0
    assert "bytes a position" in capsys.readouterr().out
    again = opened(world, "again")
    for name in ("token_ids", "probabilities"):
        ours, theirs = (getattr(x.targets([2, 0]), name) for x in (sampled, again))
        assert torch.equal(ours, theirs)
    assert make(files, world.folder / "again", "sampled", "--samples", 9, *options) == 1
    assert "of another kind: found sampled 50 1 1 seed-0 none, expected" in capsys.readouterr().err
    shard = next((world.folder / "again" / "train").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        opened(world, "again")
    # The same command, run again, replaces the damaged shard.
    assert make(files, world.folder / "again", "sampled", *options) == 0
    opened(world, "again")


def test_training_from_targets_loads_no_teacher(world, sampled, tmp_path):
    options = {**SPARSE, "data": world.data, "processing_class": world.tokenizer}
    options |= {"teacher_targets": str(world.folder / "sampled"), "kd_ratio": 0.5}
    trainer = trainer_of(tmp_path, **options)
    trainer.train()
    kd, ce, loss = (logged(trainer, key)[0] for key in ("kd", "ce", "loss"))
    assert loss == pytest.approx((kd + ce) / 2, rel=1e-4)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f", distilled from the targets `{world.folder / 'sampled'}` with lens_kernels" in card
    student = make_trainer(tmp_path).model
    ids = torch.as_tensor(world.data[0]["input_ids"])[None]
    targets = sampled.targets([0])
    lq = student(ids).logits[0].log_softmax(-1)[counted_positions(world.data[0]["labels"])]
    t, picked = targets.probabilities, lq.gather(1, targets.token_ids)
    expected = (torch.special.xlogy(t, t) - t * picked).sum(-1).mean().item()
    first = trainer_of(tmp_path, **{**options, "kd_ratio": 1.0, "per_device_train_batch_size": 1})
    first.train()
    assert logged(first, "kd")[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("lens_coeff", [1.0, 0.0])
def test_a_teacher_serves_the_lens_pairs_beside_targets_of_another(
    world, sampled, tmp_path, lens_coeff
):
    options = {**SPARSE, "data": world.data, "processing_class": world.tokenizer}
    stored, own = {"teacher_targets": str(world.folder / "sampled")}, tiny.model(**TEACHER)
    pair = {"teacher": own, "num_lens_pairs": 1, "lens_coeff": lens_coeff, "mse_coeff": 0.1}
    both, targets, teacher = (
        trainer_of(tmp_path, **options | more) for more in (stored | pair, stored, pair)
    )
    for trainer in (both, targets, teacher):
        trainer.train()
    kd, mse, loss = (logged(both, key)[0] for key in ("kd", "mse", "loss"))
    lens = logged(both, "lens")[0] if lens_coeff else 0.0
    assert loss == pytest.approx(kd + lens + 0.1 * mse, rel=1e-4)
    assert kd == logged(targets, "kd")[0] != logged(teacher, "kd")[0]
    assert mse == logged(teacher, "mse")[0]
    assert lens == (logged(teacher, "lens")[0] if lens_coeff else 0.0)
    both.create_model_card()
    origin = f"distilled from `a model in memory` and the targets `{world.folder / 'sampled'}`"
    assert origin in (tmp_path / "README.md").read_text()


def trainer_of(folder, processing_class, per_device_train_batch_size=4, **options):
    data = options.pop("data")
    teacher = options.pop("teacher") or None
    config = LensDistillConfig(
        output_dir=str(folder), max_steps=1, logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=per_device_train_batch_size, **options,
    )  # fmt: skip
    return InOrder(
        tiny.model(**STUDENT), teacher, config, train_dataset=data,
        processing_class=processing_class,
    )  # fmt: skip


def test_options_that_need_hidden_states_are_refused(world, sampled, tmp_path):
    options = {**SPARSE, "teacher_targets": str(world.folder / "sampled"), "data": world.data}
    options["processing_class"] = world.tokenizer
    for more in ({"num_lens_pairs": 2}, {"teacher_cache": str(tmp_path / "cache")}):
        with pytest.raises(ValueError, match="no hidden states for lens .* or also give a teacher"):
            trainer_of(tmp_path, **{**options, **more})
    with pytest.raises(ValueError, match="final_divergence='jsd' cannot take SparseTargets"):
        trainer_of(tmp_path, **{**options, "final_divergence": "jsd"}).train()
    with pytest.raises(ValueError, match="made from other data: its tokens or labels differ"):
        trainer_of(tmp_path, **{**options, "data": [world.data[0]]})
    with pytest.raises(ValueError, match="give no teacher, or set a positive num_lens_pairs"):
        make_trainer(tmp_path, teacher_targets="x", num_lens_pairs=0)


def records(world, number=4):
    """Return the log-probabilities that a server with this teacher would return, as records."""
    found, p, at = [], probabilities(world), 0
    for i in range(len(world.data)):
        for position in counted_positions(world.data[i]["labels"]).tolist():
            top = p[at].topk(number)
            at += 1
            lp = top.values.log().tolist()
            found.append(
                {"example": i, "position": position, "ids": top.indices.tolist(), "logprobs": lp}
            )
    return found


def test_log_probabilities_of_a_server(files, world, tmp_path, capsys):
    file, found = tmp_path / "logprobs.jsonl", records(world)
    file.write_text("\n".join(map(json.dumps, found)))
    options = ("--tokenizer", files / "teacher", "--logprobs", file)
    assert make(files, world.folder / "served", "logprobs", *options) == 0
    targets = opened(world, "served").targets(range(len(world.data)))
    assert targets.rest == "ghost" and targets.token_ids.tolist() == [x["ids"] for x in found]
    exact = torch.tensor([x["logprobs"] for x in found]).exp()
    torch.testing.assert_close(targets.probabilities, exact)
    missing = found.pop(1)
    file.write_text("\n".join(map(json.dumps, found)))
    assert make(files, tmp_path / "missing", "logprobs", *options) == 1
    where = f"no record of example {missing['example']}, position {missing['position']}"
    assert where in capsys.readouterr().err


def test_the_same_command_with_another_seed_or_file_is_refused(files, world, tmp_path, capsys):
    """Otherwise the command would report success, and leave the old targets."""
    sampled = (files, tmp_path / "sampled", "sampled", "--teacher", files / "teacher")
    assert make(*sampled, "--seed", 1) == make(*sampled, "--seed", 1) == 0
    assert make(*sampled, "--seed", 2) == 1
    file = tmp_path / "logprobs.jsonl"
    served = (files, tmp_path / "served", "logprobs", "--tokenizer", files / "teacher")
    for number, status in ((4, 0), (4, 0), (3, 1)):
        file.write_text("\n".join(map(json.dumps, records(world, number))))
        assert make(*served, "--logprobs", file) == status
    assert capsys.readouterr().err.count("of another kind: found") == 2


def answers_of_vllm(world, found, shift=0):
    """Return vLLM's answers with ``found``, to prompts with ``shift`` more tokens before them."""
    answers = []
    for i in range(len(world.data)):
        tokens = [0] * shift + world.data[i]["input_ids"]
        answer = [None, *({str(token): {"logprob": -3.0}} for token in tokens[1:])]
        for x in (x for x in found if x["example"] == i):
            # vLLM puts the prompt's own token first, whatever its rank.
            pairs = [*zip(x["ids"], x["logprobs"], strict=True)][::-1]
            answer[x["position"] + 1 + shift] = {
                str(token): {"logprob": lp, "rank": rank, "decoded_token": "?"}
                for rank, (token, lp) in enumerate(pairs)
            }
        answers.append({"id": "cmpl-1", "choices": [{"index": 0, "prompt_logprobs": answer}]})
    return "\n\n".join(map(json.dumps, answers))


def test_parquet_and_vllm_give_the_same_records(world, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    found = records(world, 64)  # with all tokens, so that each record has the prompt's own token
    parquet.write_table(Table.from_pylist(found), tmp_path / "x.parquet")
    table = logprobs.read(tmp_path / "x.parquet")
    path = tmp_path / "answers.jsonl"
    path.write_text(answers_of_vllm(world, found))
    read = logprobs.read(path, "vllm")
    logprobs.check_examples(read, world.data, path, "vllm")
    assert {key: read[key] for key in table} == table
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is not a readable Parquet file"):
        logprobs.read(tmp_path / "x.parquet")


def test_log_probabilities_of_other_examples_are_refused(world, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(answers_of_vllm(world, [], shift=1))
    with pytest.raises(ValueError, match="answer for example 0 has another prompt"):
        logprobs.check_examples(logprobs.read(path, "vllm"), world.data, path, "vllm")
    found = {(len(world.data), 0): ([1], [-1.0])}
    with pytest.raises(ValueError, match="has a record of example 7, but the data has 7 examples"):
        logprobs.check_examples(found, world.data, path, "records")


GOOD = {"example": 0, "position": 1, "ids": [3, 4], "logprobs": [-0.5, -1.5]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [0.5, -1.0]}, "line 2: the log-probability 0.5 is above 0"),
        ({"logprobs": [-2.0, -1.0]}, "line 2: logprobs are not in descending order"),
        ({"logprobs": [-1.0]}, "line 2: logprobs must be a list as long as ids"),
        ({"logprobs": [-1.0, math.nan]}, "line 2: logprobs must be numbers, got nan"),
        ({"ids": [3, 3]}, "line 2: ids holds a token twice"),
        ({"ids": "34"}, "line 2: ids must be a list of token ids"),
        ({"ids": [3, 2**31]}, "line 2: ids must be a list of token ids"),
        ({"logprobs": [-0.1, -0.2]}, r"line 2: the probabilities .* in \(0, 1\], got 1.72357"),
        ({"logprobs": [-math.inf] * 2}, r"line 2: the probabilities .* in \(0, 1\], got 0"),
        ({"position": None}, "line 2: example and position must be integers from 0 on"),
        ({"position": 0}, "line 2: example 0 has position 0 twice"),
    ],
)
def test_malformed_records_are_refused_with_their_line(tmp_path, change, message):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, [{**GOOD, "position": 0}, {**GOOD, **change}])))
    with pytest.raises(ValueError, match=message):
        logprobs.read(path)


@pytest.mark.parametrize(
    ("text", "form", "message"),
    [
        ("{", "records", "line 1: is not JSON"),
        ("\xff", "records", "line 1: is not JSON"),
        ("[1]", "records", "line 1: expected an object, got a list"),
        ("{}", "records", r"line 1: has no 'example', only \[\]"),
        ("{}", "vllm", "line 1: has no prompt_logprobs: set them in the request"),
        ('{"prompt_logprobs": [null, {"a": 1}]}', "vllm", r"prompt_logprobs\[1\] must map token"),
    ],
)
def test_other_files_are_refused_with_their_line(tmp_path, text, form, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        logprobs.read(path, form)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sampled", [], "kind sampled needs --teacher"),
        ("logprobs", ["--tokenizer", "x"], "kind logprobs needs --logprobs"),
        ("logprobs", ["--tokenizer", "x", "--temperature", "2"], "temperature=2 does not apply"),
        ("topk", ["--teacher", "x", "--proposal_temperature", "2"], "kind sampled only"),
        ("sampled", ["--teacher", "x", "--samples", "0"], "samples must be at least 1, got 0"),
    ],
)
def test_missing_and_useless_options_are_named(files, tmp_path, capsys, kind, options, message):
    assert make(files, tmp_path, kind, *options) == 1
    assert message in capsys.readouterr().err
