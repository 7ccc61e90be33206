"""The trainer checks data, models and options before training, and weights before saving."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lens_kernels.hf import LensDistillConfig, LensDistillTrainer
from lens_kernels.hf.model import loading
from lens_kernels.hf.model.state import whole_state
from lens_kernels.hf.training import checks
from lens_kernels.hf.training.checks import check_distribution
from tests.support import tiny
from tests.support.training import STUDENT, TEACHER, make_trainer

IDS = [5, 6, 7, 8, 9, 10]
ROW = {"input_ids": IDS, "labels": IDS}
TUNE = {"teacher": False, "kd_ratio": 0.0}


def given(folder, teacher=True, student=None, vocab_size=None, **arguments):
    """Return a trainer with these arguments and a config that has only default values."""
    options = {"vocab_size": vocab_size} if teacher else {"kd_ratio": 0.0}
    config = LensDistillConfig(output_dir=str(folder), use_cpu=True, report_to="none", **options)
    teacher = tiny.model(**TEACHER) if teacher else None
    student = tiny.model(**STUDENT) if student is None else student
    return LensDistillTrainer(student, teacher, config, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": IDS[1:]}, r"labels of example 1 of train_dataset has shape \(5,\), but input"),
        ({"input_ids": [*IDS[1:], 64]}, "input_ids of example 1 of train_dataset hold 64, but a"),
        ({"labels": [*IDS[1:], 64]}, "labels of example 1 of train_dataset hold 64, but a model"),
        ({"labels": [*IDS[1:], -1]}, "labels of example 1 of train_dataset hold -1, but a model"),
        ({"input_ids": []}, r"labels of example 1 .*shape \(6,\), but input_ids has \(0,\)"),
        ({"input_ids": [], "labels": []}, "example 1 of train_dataset has no input_ids: leave"),
    ],
    ids=["shape", "large_id", "large_label", "negative_label", "no_ids", "no_tokens"],
)
@pytest.mark.parametrize("options", [{}, TUNE], ids=["distil", "tune"])
def test_data_that_do_not_fit_are_refused_before_training(tmp_path, options, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, data=[ROW, {**ROW, **change}], **options)


def test_labels_beyond_the_shared_vocabulary_are_refused_before_training(tmp_path):
    inputs, first = [*IDS[1:], 63], [63, *IDS[1:]]  # no loss uses the label of the first token
    given(tmp_path, vocab_size=60, train_dataset=[{"input_ids": inputs, "labels": first}])
    above = [ROW, {**ROW, "labels": inputs}]
    given(tmp_path, False, vocab_size=60, train_dataset=above)
    with pytest.raises(
        ValueError, match=r"labels of example 1 of train_dataset hold 63, but vocab"
    ):
        given(tmp_path, vocab_size=60, train_dataset=above)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_data_beyond_the_positions_are_refused_before_training(tmp_path, kind):
    models = {
        "student": tiny.model(kind, **STUDENT),
        "teacher": tiny.model(kind, **TEACHER, max_position_embeddings=10),
    }
    for length, column in ((10, "input_ids"), (11, "input_ids"), (10, "position_ids")):
        row = {"input_ids": [5] * length, "labels": [5] * length}
        if column == "position_ids":
            row[column] = [*range(9), 10]
        if length == 10 and column == "input_ids":
            # Ten tokens fit: the student has 64 positions, and the teacher has 10.
            make_trainer(tmp_path, data=[row], **models)
            continue
        with pytest.raises(ValueError, match="example 0 of train_dataset reaches position 11, but"):
            make_trainer(tmp_path, data=[row], **models)
    with pytest.raises(ValueError, match=r"example 0 of eval_dataset\['a'\] reaches position 65"):
        row = {"input_ids": [5] * 65, "labels": [5] * 65}
        given(tmp_path, False, models["student"], eval_dataset={"a": [row]})
    # Models with rotary positions have no maximum length, because positions are computed.
    make_trainer(tmp_path, data=[{"input_ids": [5] * 70, "labels": [5] * 70}])


@pytest.mark.parametrize("options", [{}, TUNE], ids=["distil", "tune"])
def test_data_without_a_label_are_refused(tmp_path, options):
    # The only label is on the first token, which no position predicts.
    nothing = {**ROW, "labels": [7, *[-100] * 5]}
    with pytest.raises(ValueError, match="no token to train on, because every label"):
        make_trainer(tmp_path, data=[nothing] * 4, **options)
    trainer = make_trainer(tmp_path, data=[nothing] * 4 + [ROW], max_steps=1, **options)
    with pytest.raises(ValueError, match="no step had a token with a label, so nothing was learnt"):
        # The only step of this trainer reads the first four rows, which have no label to train on.
        trainer.train()


@pytest.mark.parametrize("options", [{}, TUNE], ids=["distil", "tune"])
def test_weights_that_are_not_numbers_are_not_saved(tmp_path, options):
    trainer = make_trainer(tmp_path, max_steps=1, **options)
    trainer.save_model()
    before = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    message = r"1 trained weights are not finite, such as model\.layers\.1\.mlp\.up_proj\.weight,"
    with pytest.raises(ValueError, match=message):
        trainer.save_model()
    # With DeepSpeed, the Trainer would handle a ValueError by writing an empty model.
    trainer.is_deepspeed_enabled = True
    with pytest.raises(RuntimeError, match=message):
        trainer._save(str(tmp_path), trainer.model.state_dict())
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    trainer = make_trainer(tmp_path, max_steps=3, **options)
    # the config would refuse an infinite learning rate earlier
    trainer.args.learning_rate = float("inf")
    with pytest.raises(ValueError, match=r"loss is nan at step 2|weights are not finite"):
        trainer.train()
    quiet = make_trainer(tmp_path, max_steps=1, **options)
    quiet.args.learning_rate = float("inf")
    with pytest.raises(ValueError, match="trained weights are not finite"):
        quiet.train()


def test_a_users_optimizer_must_hold_the_matrices(tmp_path):
    student = tiny.model(**STUDENT)
    config = LensDistillConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", mse_coeff=0.5, max_steps=2
    )
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    trainer = LensDistillTrainer(
        student, tiny.model(**TEACHER), config, train_dataset=[ROW], optimizers=(optimizer, None)
    )
    with pytest.raises(ValueError, match=r"optimizer lacks the matrices of mse_coeff"):
        trainer.train()
    matrices = list(trainer.lens_objective.projections.parameters())
    trainer.optimizer.add_param_group({"params": matrices})
    start = [x.detach().clone() for x in matrices]
    trainer.train()
    assert not any(map(torch.equal, start, matrices))


def test_a_router_loss_is_not_dropped(tmp_path):
    student = tiny.model(**STUDENT)
    student.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True, which adds a router loss"):
        make_trainer(tmp_path, student=student)
    make_trainer(tmp_path, student=student, **TUNE)


UNSERVED = {
    TypeError: [
        ({"peft_config": 1}, "does not take peft_config: wrap the model with peft.get_peft_model"),
        ({"teacher_model": 1}, "does not take teacher_model: pass it as teacher"),
        ({"train_data": 1}, "does not take train_data: did you mean train_dataset"),
        ({"train_dataset": ["text"]}, "an example is a str, expected a mapping with input_ids"),
        ({"student": torch.compile(tiny.model(**STUDENT))}, "model is compiled, .* without torch"),
    ],
    ValueError: [
        ({"compute_metrics": len}, "compute_metrics needs logits, but with a teacher no logits"),
        ({"compute_loss_func": len}, "compute_loss_func needs logits, but with a teacher"),
        (
            {"train_dataset": [{"texts": "a"}]},
            "0 of train_dataset has no input_ids, only texts: to",
        ),
        ({"student": "some/name"}, "model='some/name' is not a folder: give .* from_pretrained"),
    ],
}


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [(error, *row) for error, rows in UNSERVED.items() for row in rows],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_unsupported_arguments_are_refused_with_a_fix(tmp_path, error, arguments, message):
    with pytest.raises(error, match=message):
        given(tmp_path, **arguments)


def test_rows_of_different_lengths_are_padded_without_a_tokenizer(tmp_path):
    short = {"input_ids": IDS[:3], "labels": IDS[:3]}
    both, *single = (
        make_trainer(tmp_path, data=x).evaluate(x) for x in ([ROW, short], [ROW], [short])
    )
    expected = (5 * single[0]["eval_loss"] + 2 * single[1]["eval_loss"]) / 7
    assert both["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_default_number_of_lens_pairs_fits_small_models(tmp_path):
    for blocks, layers in ((6, [1, 2, 4, 5]), (4, [1, 2, 3]), (2, [1]), (1, [])):
        student = tiny.model(layers=blocks, seed=1)
        objective = make_trainer(
            tmp_path, student=student, teacher=tiny.model(layers=6), num_lens_pairs=None
        ).lens_objective
        assert objective.student_layers == layers
        assert len(objective.teacher_layers) == len(layers)


@pytest.mark.parametrize("name", ["cp_size", "sp_size", "tp_size"])
def test_parallelism_within_a_sequence_or_layer_is_refused(tmp_path, name):
    trainer = make_trainer(tmp_path)
    parallelism = pytest.importorskip("accelerate.parallelism_config").ParallelismConfig()
    setattr(parallelism, name, 2)
    trainer.args.parallelism_config = parallelism
    with pytest.raises(RuntimeError, match=f"parallelism_config has {name}=2, but the .*DDP"):
        check_distribution(trainer.args)
    setattr(parallelism, name, 1)
    check_distribution(trainer.args)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"mse_coeff": 0.1}, "mse_coeff=0.1"),
        ({"train_student_lens": True}, "train_student_lens=True"),
        ({"teacher_cache": "cache"}, "teacher_cache"),
        ({"on_policy": 0.5}, "on_policy=0.5"),
    ],
)
def test_what_zero_3_does_not_support_is_refused(tmp_path, monkeypatch, option, name):
    args = LensDistillConfig(output_dir=str(tmp_path), use_cpu=True, **option)
    check_distribution(args)
    monkeypatch.setattr(checks, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RuntimeError, match=f"^{name} is not supported with DeepSpeed ZeRO-3"):
        check_distribution(args)


def test_weights_that_zero_3_partitions_are_gathered_before_they_are_checked(monkeypatch):
    """A stand-in for DeepSpeed holds the whole weight, whose last entry is NaN."""
    whole = torch.tensor([1.0, 2.0, float("nan")])
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_numel = 3

    @contextmanager
    def gather(held):
        (x,) = held
        x.data = whole
        yield
        x.data = torch.empty(0)

    zero = SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    with pytest.raises(ValueError, match="1 trained weights are not finite, such as a"):
        checks.check_weights({"a": weight}, ["a"])
    model = torch.nn.Module()
    model.a = weight
    with pytest.raises(ValueError, match="'folder' hold NaN in a"):
        loading._check_numbers("folder", model)
    whole[2] = 3.0
    checks.check_weights({"a": weight}, ["a"])
    loading._check_numbers("folder", model)
    model.tied = weight
    state = whole_state(model, keep=True)
    assert state["a"] is state["tied"] and torch.equal(state["a"], whole)
    assert whole_state(model, keep=False) == {}
    assert not weight.numel()


def test_uneven_numbers_of_batches_are_refused(tmp_path, monkeypatch):
    args = make_trainer(tmp_path, accelerator_config={"even_batches": False}).args
    check_distribution(args)
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    with pytest.raises(RuntimeError, match="even_batches=False, but a process without a batch"):
        check_distribution(args)
