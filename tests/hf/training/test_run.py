"""The command ``lens-kernels train`` on tiny models: options, files, errors, and going on."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from tests.support import tiny

pytest.importorskip("transformers")
from lens_kernels import cli  # noqa: E402
from lens_kernels.hf import uniform_layers  # noqa: E402
from lens_kernels.hf.model.loading import load_model  # noqa: E402
from lens_kernels.hf.training import command  # noqa: E402
from lens_kernels.hf.training.trainer import LensDistillTrainer  # noqa: E402

pytestmark = pytest.mark.hf
WORDS = ["a cat sat", "the dog ran off", "no", "an old hat", "we sing at noon", "fish swim", "up"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a student, a teacher and data."""
    folder = tmp_path_factory.mktemp("files")
    for name, model in (
        ("student", tiny.model(layers=3, seed=1)),
        ("teacher", tiny.model(layers=4, width=24, seed=2)),
    ):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": word, "completion": word[::-1]} for word in WORDS]
    for name, part in (("train", rows), ("eval", rows[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def arguments(files, output, **options):
    given = {
        "student": files / "student",
        "teacher": files / "teacher",
        "train": files / "train.jsonl",
        "output": output,
        "num_lens_pairs": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    } | options
    argv = ["train"]
    for name, value in given.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *map(str, values)]
    return argv


def weights(folder):
    return load_model(str(folder)).state_dict()


def test_a_run_leaves_a_student_its_options_and_its_history(files, tmp_path, capsys):
    argv = arguments(files, tmp_path, eval=files / "eval.jsonl", report_to="tensorboard")
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    for expected in ("train: 7 rows", "eval: 2 rows", "[1, 2] and [1, 3]", "eval_lens_1"):
        assert expected in shown
    start, end = weights(files / "student"), weights(tmp_path)
    assert any((end[name] - start[name]).abs().max() > 1e-3 for name in start)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_kd"] + metrics["eval_lens"])
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    record = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert record["max_steps"] == 4 and record["learning_rate"] == 0.01
    assert "beta" not in record  # only what was chosen
    assert cli.main(argv) == 0  # a run that is done has nothing left to do
    again = weights(tmp_path)
    assert all(torch.equal(end[name], again[name]) for name in end)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = min(tmp_path.glob("**/events.out.tfevents.*"))  # evaluation begins another
    reader = EventAccumulator(str(events))
    reader.Reload()
    for tag in ("ce", "kd", "lens_1", "lens_2", "entropy_teacher_final", "tokens_per_second"):
        assert len(reader.Scalars(f"train/{tag}")) == 4


def test_the_recorded_options_make_the_same_student_again(files, tmp_path):
    assert cli.main(arguments(files, tmp_path / "one", seed=3)) == 0
    again = ["train", "--config", str(tmp_path / "one" / "run.yaml")]
    assert cli.main([*again, "--output", str(tmp_path / "two")]) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def interrupted(monkeypatch, argv, before_step):
    """Run until the step begins that a power cut would have hit."""
    calls = {"n": 0}
    step = LensDistillTrainer.training_step

    def cut(self, *args, **kwargs):
        calls["n"] += 1
        if calls["n"] == before_step:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LensDistillTrainer, "training_step", cut)
        with pytest.raises(KeyboardInterrupt):
            cli.main(argv)


@pytest.mark.parametrize("cache", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_end(files, tmp_path, monkeypatch, capsys, cache):
    options = {"max_steps": 6, "gradient_accumulation_steps": 2}
    if cache:
        options["teacher_cache"] = tmp_path / "cache"
    assert cli.main(arguments(files, tmp_path / "whole", **options)) == 0
    argv = arguments(files, tmp_path / "cut", **options)
    interrupted(monkeypatch, argv, before_step=10)
    capsys.readouterr()
    assert cli.main(argv) == 0
    assert f"resuming from {tmp_path / 'cut' / 'checkpoint-4'}" in capsys.readouterr().out
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    start = weights(files / "student")
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-6)
    assert max((whole[name] - start[name]).abs().max() for name in whole) > 1e-3


def test_a_checkpoint_that_was_cut_off_is_passed_over(files, tmp_path):
    argv = arguments(files, tmp_path)
    assert cli.main(argv) == 0
    assert command.last_checkpoint(tmp_path).name == "checkpoint-4"
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:-9])
    assert command.last_checkpoint(tmp_path).name == "checkpoint-2"
    state.unlink()
    assert command.last_checkpoint(tmp_path).name == "checkpoint-2"
    assert command.last_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_past_its_last_step_trains_no_further(files, tmp_path, monkeypatch, capsys, finished):
    argv = arguments(files, tmp_path, max_steps=5, eval=files / "eval.jsonl")  # 4 to an epoch
    assert cli.main(argv) == 0
    end, metrics = weights(tmp_path), (tmp_path / "metrics.json").read_text()
    if not finished:  # cut off between the last checkpoint and the end
        (tmp_path / "metrics.json").write_text(metrics[:-5])
        (tmp_path / "model.safetensors").unlink()
    forbidden = "training_step" if not finished else "train"
    monkeypatch.setattr(LensDistillTrainer, forbidden, lambda *_, **__: pytest.fail("trained on"))
    capsys.readouterr()
    assert cli.main(argv) == 0
    assert ("it is done: delete" in capsys.readouterr().out) == finished
    again = weights(tmp_path)
    assert all(torch.equal(end[name], again[name]) for name in end)
    loss = json.loads((tmp_path / "metrics.json").read_text())["eval_loss"]
    assert loss == pytest.approx(json.loads(metrics)["eval_loss"], rel=1e-6)


def test_without_the_optimisers_state_a_run_begins_anew(files, tmp_path, monkeypatch, capsys):
    options = {"max_steps": 5, "save_only_model": True}
    assert cli.main(arguments(files, tmp_path / "whole", **options)) == 0
    argv = arguments(files, tmp_path / "cut", **options)
    interrupted(monkeypatch, argv, before_step=4)
    assert command.last_checkpoint(tmp_path / "cut").name == "checkpoint-2"
    assert cli.main(argv) == 0
    assert "resuming" not in capsys.readouterr().out
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_another_run_in_the_same_folder_is_refused(files, tmp_path, capsys):
    assert cli.main(arguments(files, tmp_path)) == 0
    assert cli.main(arguments(files, tmp_path, beta=0.3, learning_rate=0.02)) == 1
    shown = capsys.readouterr().err
    assert "beta (was None, is 0.3), learning_rate (was 0.01, is 0.02)" in shown


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize("done", [False, True])
def test_a_run_does_not_go_on_with_data_that_have_changed(
    files, tmp_path, monkeypatch, capsys, name, done
):
    data = tmp_path / "data.jsonl"
    data.write_text((files / "train.jsonl").read_text())
    argv = arguments(files, tmp_path / "out", **{"eval": files / "eval.jsonl", name: data})
    if done:
        assert cli.main(argv) == 0
    else:
        interrupted(monkeypatch, argv, before_step=4)
    before = data.read_text()
    data.write_text(before.replace("fish swim", "fish swam"))
    assert cli.main(argv) == 1
    message = (
        f"{name} file {data} has changed since the run in {tmp_path / 'out'} started: restore it"
    )
    assert message in capsys.readouterr().err
    data.write_text(before)
    assert cli.main(argv) == 0
    data.write_text(before.replace("fish swim", "fish swam"))
    (tmp_path / "out" / "data.json").unlink()  # as in runs of earlier versions
    assert cli.main(argv) == 0


def test_bad_data_stops_the_run_before_any_model_is_read(files, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((files / "train.jsonl").read_text() + '{"prompt": "x"}\n')
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("a model was read"))
    assert cli.main(arguments(files, tmp_path / "out", train=bad)) == 1
    assert "bad.jsonl:8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_of_other_tokenizers_are_refused(files, tmp_path, capsys):
    other = tmp_path / "teacher"
    tiny.model(layers=4, vocab=60).save_pretrained(other)
    tiny.tokenizer(vocab=60).save_pretrained(other)
    assert cli.main(arguments(files, tmp_path / "out", teacher=other)) == 1
    assert "number 3 tokens differently: " in capsys.readouterr().err


def test_a_missing_model_says_how_to_go_on(files, tmp_path, capsys):
    assert cli.main(arguments(files, tmp_path / "out", teacher=tmp_path / "none")) == 1
    shown = capsys.readouterr().err
    assert "cannot be read" in shown and "allow_download" in shown


def test_lora_trains_an_adapter_and_nothing_else(files, tmp_path):
    options = {"lora_r": 2, "lora_alpha": 5, "lora_dropout": 0.25}
    targets = ["q_proj", "down_proj"]
    argv = arguments(files, tmp_path, lora_target_modules=targets, max_steps=6, **options)
    assert cli.main(argv) == 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 5, 0.25)
    assert set(config["target_modules"]) == set(targets)
    trained = load_model(str(tmp_path))
    start = weights(files / "student")
    for name, x in trained.get_base_model().state_dict().items():
        if "lora_" in name:
            continue
        assert torch.equal(x, start[name.replace("base_layer.", "")]), name
    moved = [x.abs().max() for name, x in trained.named_parameters() if "lora_B" in name]
    assert len(moved) == 6 and min(moved) > 0  # 3 blocks; the last is reached by the final term


def test_an_adapter_can_be_the_student_and_is_trained_on(files, tmp_path, capsys):
    argv = arguments(files, tmp_path / "one", lora_r=2, lora_target_modules=["q_proj"])
    assert cli.main(argv) == 0
    again = {"student": tmp_path / "one"}
    assert cli.main(arguments(files, tmp_path / "two", **again)) == 0
    before, after = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all("lora_" in name for name in moved)
    assert cli.main(arguments(files, tmp_path / "three", lora_r=2, **again)) == 1
    assert "lora_r=2 would put a second adapter on" in capsys.readouterr().err


def test_an_adapter_can_be_the_teacher(files, tmp_path, capsys):
    argv = arguments(files, tmp_path / "adapter", lora_r=2, lora_target_modules=["q_proj"])
    assert cli.main(argv) == 0
    assert cli.main(arguments(files, tmp_path / "out", teacher=tmp_path / "adapter")) == 0


def first_loss(files, output, **options):
    assert cli.main(arguments(files, output, max_steps=1, save_strategy="no", **options)) == 0
    return json.loads((output / "metrics.json").read_text())["train_loss"]


@pytest.mark.parametrize(
    "options",
    [
        {"student_blocks": [1, 3], "num_lens_pairs": 1},
        {"student_dtype": "bfloat16"},
        {"teacher_dtype": "bfloat16"},
        {"max_length": 8},
        {"max_prompt_length": 9},
        {"seed": 5},
        {"kd_ratio": 0.0, "teacher": None},
    ],
    ids=str,
)
def test_options_of_models_and_data_change_the_run(files, tmp_path, options):
    plain = first_loss(files, tmp_path / "plain")
    assert first_loss(files, tmp_path / "other", **options) != pytest.approx(plain, rel=1e-6)


def test_the_prompt_style_reaches_the_data(files, tmp_path, capsys):
    train = tmp_path / "train.jsonl"
    train.write_text('{"instruction": "sing", "output": "la"}\n' * 4)
    assert cli.main(arguments(files, tmp_path / "out", train=train, prompt_style="chat")) == 1
    assert "template" in capsys.readouterr().err
    assert cli.main(arguments(files, tmp_path / "out", train=train, prompt_style="alpaca")) == 0


def test_options_come_from_a_file_and_the_command_line_goes_first(files, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("beta: 0.25\nstudent_layers: [1]\nteacher_layers: [2]\nlens_norm: false\n")
    argv = arguments(files, tmp_path, num_lens_pairs=None)[1:]
    _, args, chosen = command.parse([*argv, "--config", str(config), "--beta", "0.75"])
    assert (args.beta, args.student_layers, args.lens_norm) == (0.75, [1], False)
    assert chosen["beta"] == 0.75 and chosen["lens_norm"] is False
    assert chosen["output_dir"] == str(tmp_path)


def test_the_record_holds_plain_values_and_no_secret(files, tmp_path):
    argv = arguments(files, tmp_path, debug=["underflow_overflow"], hub_token="hf_secret")[1:]
    _, args, chosen = command.parse(argv)
    assert args.hub_token == "hf_secret" and "hub_token" not in chosen
    assert yaml.safe_load(yaml.safe_dump(chosen))["debug"] == ["underflow_overflow"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--conf", "run.yaml"], "--conf run.yaml"),
        (["--pres", "gpt2"], "--pres gpt2"),
        (["--resume_from_checkpoint", "x"], "resumes from the last complete checkpoint"),
    ],
)
def test_options_without_effect_are_refused(files, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        command.parse([*arguments(files, tmp_path)[1:], *more])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "'lerning_rate' is not an option; did you mean 'learning_rate'"),
        ("- a", "must hold options as 'name: value', got a list"),
        ("a: [", "is not YAML"),
        ("beta: 2", "beta must be finite and lie between 0 and 1"),
        ("beta: many", "argument --beta: invalid float value"),
        ("lens_divergence: kl", "invalid choice: 'kl'"),
    ],
)
def test_a_bad_file_of_options_is_refused(files, tmp_path, capsys, text, message):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit):
        command.parse([*arguments(files, tmp_path)[1:], "--config", str(config)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "pairs", "blocks"),
    [
        ("gpt2", 5, (12, 48)),
        ("gpt2-medium", 5, (24, 48)),
        ("tinyllama", 5, (22, 32)),
        ("qwen2.5", 4, (28, 36)),
    ],
)
def test_presets_are_the_papers_lists(files, tmp_path, preset, pairs, blocks):
    argv = arguments(files, tmp_path, num_lens_pairs=None, use_cpu=None, learning_rate=None)[1:]
    run, args, _ = command.parse([*argv, "--preset", preset, "--bf16", "false"])
    student, teacher = (uniform_layers(pairs, n) for n in blocks)
    assert args.student_layers == student
    if preset == "tinyllama":  # the paper rounds this one down
        teacher = [i * 32 // 6 for i in range(1, 6)]
    assert args.teacher_layers == teacher
    assert (args.kd_ratio, args.lens_coeff, args.final_divergence) == (1.0, 1.0, "reverse_kl")
    assert args.lr_scheduler_type == "cosine" and 0 < args.learning_rate < 1e-3
    assert (run.lora_r == 8) == (preset == "qwen2.5")
    assert preset in command.presets()


def test_help_describes_every_option_of_ours(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for name in ("--student", "--lens_divergence", "--teacher_cache", "--preset", "--output"):
        assert name in shown
    for kind in (command.RunConfig, command.LensDistillConfig):
        for name in kind.__annotations__:
            if not name.startswith("_"):
                assert kind.__dataclass_fields__[name].metadata["help"], name
