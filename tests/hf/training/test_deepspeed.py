"""Training with DeepSpeed on two and three ranks equals training in one process."""

import json

import pytest
from safetensors.torch import load_file

from tests.hf.training.test_distributed import launch
from tests.support import tiny
from tests.support.training import STUDENT, assert_same_step, make_trainer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "tied", "ranks"),
    [(1, False, 2), (2, False, 2), (3, False, 2), (3, True, 2), (3, False, 3)],
)
def test_zero_trains_like_one_process(tmp_path, stage, tied, ranks):
    pytest.importorskip("deepspeed")
    rows = {2: 4, 3: 3}[ranks]
    case = {"stage": stage, "tied": tied, "rows": rows}
    launch("tests.support.deepspeed_run", ranks, [str(tmp_path), json.dumps(case)])
    student = tiny.model(**STUDENT, tie_word_embeddings=tied)
    start = {name: x.detach().clone() for name, x in student.named_parameters()}
    whole = make_trainer(tmp_path / "whole", batch=rows, student=student, kd_ratio=0.5)
    whole.train()
    end = load_file(tmp_path / "student" / "model.safetensors")
    assert_same_step(start, dict(whole.model.named_parameters()), end, 1e-4)
    loss = whole.evaluate()["eval_loss"]
    for rank in range(ranks):
        assert float((tmp_path / f"loss-{rank}").read_text()) == pytest.approx(loss, rel=1e-5)
