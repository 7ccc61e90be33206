"""Training with DeepSpeed on two and three ranks equals training in one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lens_kernels import cli
from lens_kernels.hf.model.loading import load_model, load_tokenizer
from tests.hf.training.test_distributed import launch
from tests.hf.training.test_sharded_models import VOCAB, WIDTHS
from tests.hf.training.test_sharded_models import planned as planned_bytes
from tests.support import tiny
from tests.support.commands import arguments, weights
from tests.support.deepspeed_run import config_of, student_of
from tests.support.training import STUDENT, assert_same_step, make_trainer

pytestmark = pytest.mark.slow


def saved_weights(folder, adapter):
    """Return the weights of a model's folder, under the names that the model in memory has."""
    if not adapter:
        return load_file(folder / "model.safetensors")
    weights = load_file(folder / "adapter_model.safetensors")
    return {f"{k.removesuffix('.weight')}.default.weight": x for k, x in weights.items()}


@pytest.mark.parametrize(
    ("stage", "kind", "ranks"),
    [(1, "untied", 2), (2, "untied", 2), (2, "lora", 2)]
    + [(3, "untied", 2), (3, "tied", 2), (3, "lora", 2), (3, "untied", 3)],
)
def test_zero_trains_like_one_process(tmp_path, stage, kind, ranks):
    pytest.importorskip("deepspeed")
    rows = {2: 4, 3: 3}[ranks]
    model = {"tied": kind == "tied", "lora": kind == "lora"}
    case = {"stage": stage, "rows": rows, **model}
    launch("tests.support.deepspeed_run", ranks, [str(tmp_path), json.dumps(case)])
    student = student_of(**model)
    start = {name: x.detach().clone() for name, x in student.named_parameters()}
    whole = make_trainer(tmp_path / "whole", batch=rows, student=student, kd_ratio=0.5)
    whole.train()
    trained = {k: x for k, x in whole.model.named_parameters() if x.requires_grad}
    assert_same_step(start, trained, saved_weights(tmp_path / "student", kind == "lora"), 1e-4)
    if kind == "lora":
        # No other files hold the tiny student, so the run saves it as the base of the adapter.
        base = load_file(tmp_path / "base_model" / "model.safetensors")
        expected = tiny.model(**STUDENT).state_dict()
        assert base.keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) for name, x in base.items())
    loss = whole.evaluate()["eval_loss"]
    for rank in range(ranks):
        assert float((tmp_path / f"loss-{rank}").read_text()) == pytest.approx(loss, rel=1e-5)


@pytest.fixture
def config(tmp_path):
    pytest.importorskip("deepspeed")
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(config_of(3)))
    return file


BLOCKS = {"student_blocks": [1, 3]}
LORA = {"lora_r": 2, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "up_proj"]}


@pytest.mark.parametrize("option", [{}, BLOCKS, BLOCKS | LORA], ids=["whole", "blocks", "lora"])
def test_the_command_trains_models_that_are_partitioned_while_they_load(
    files, tmp_path, config, option
):
    """With ZeRO-3, the command gives the student of one process. The second batch is uneven."""
    whole, shared = (tmp_path / name for name in ("whole", "shared"))
    given = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    given |= {"lr_scheduler_type": "constant", "kd_ratio": 0.5, "save_steps": 1}
    given |= {"num_lens_pairs": 1, **option}
    assert cli.main(arguments(files, whole, per_device_train_batch_size=4, **given)) == 0
    # DeepSpeed's config chooses the device.
    given |= {"use_cpu": None, "deepspeed": config}
    launch("tests.support.deepspeed_command", 2, arguments(files, shared, **given))
    start, one = weights(whole / "checkpoint-1"), weights(whole)
    assert_same_step(start, one, weights(shared), 1e-4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_sends_what_the_plan_counts(tmp_path, ranks):
    pytest.importorskip("deepspeed")
    file = tmp_path / "traffic.json"
    launch("tests.support.deepspeed_traffic", ranks, [str(file)])
    found = json.loads(file.read_text())
    planned = planned_bytes(found["parameters"], ranks, "zero3")
    first, *others = found["seen"]
    # The plan leaves out that norms are gathered again together with their head: the student's in
    # forward and backward, and the teacher's once.
    student, teacher = WIDTHS
    norms = 4 * (2 * student + teacher)
    assert first["all_gather"] == planned["all_gather"] + norms
    assert first["reduce_scatter"] == planned["reduce_scatter"]
    # After the first step, DeepSpeed keeps up to 1e9 of the teacher's parameters between steps.
    kept = 4 * (found["parameters"][1] - VOCAB * teacher)
    for step in others:
        assert planned["all_gather"] - kept <= step["all_gather"] <= first["all_gather"]
        assert step["reduce_scatter"] == planned["reduce_scatter"]


def test_partitioned_weights_that_are_nan_are_refused(files, tmp_path, config):
    student = load_model(str(files / "student"))
    with torch.no_grad():
        # This weight is in the last block. Rank 1 holds its last entry.
        student.model.layers[-1].mlp.down_proj.weight[-1, -1] = float("nan")
    student.save_pretrained(tmp_path / "broken")
    load_tokenizer(str(files / "student")).save_pretrained(tmp_path / "broken")
    given = {"student": tmp_path / "broken", "use_cpu": None, "deepspeed": config}
    argv = arguments(files, tmp_path / "out", **given)
    output = launch("tests.support.deepspeed_command", 2, argv, fails=True)
    assert "broken' hold NaN in model.layers.2.mlp.down_proj.weight" in output, output[-3000:]
