"""The objective of two models on a batch, and what capturing their states leaves behind."""

import pytest
import torch

from lens_kernels.hf import LensObjective, capture
from lens_kernels.hf.model.capture import replaced_forward
from lens_kernels.hf.training.meter import evaluate
from tests.support import tiny
from tests.support.training import STUDENT, TEACHER, tokens


def test_hooks_are_gone_after_capture_even_after_an_error():
    model = tiny.model()
    with pytest.raises(RuntimeError, match="boom"), capture(model, [1, 2]):
        raise RuntimeError("boom")
    assert not any(m._forward_hooks for m in model.modules())


def test_a_forward_that_was_set_on_the_instance_comes_back_even_after_an_error():
    model = tiny.model()
    for before in (None, lambda **_: "earlier"):
        if before is not None:
            model.forward = before
        with pytest.raises(RuntimeError, match="boom"), replaced_forward(model, lambda **_: "now"):
            assert model(input_ids=1) == "now"
            raise RuntimeError("boom")
        assert vars(model).get("forward") is before


def test_layers_that_are_no_lens_are_refused():
    student, teacher = tiny.model(layers=4), tiny.model(layers=6)
    for layers in ([4], [0], [7]):
        with pytest.raises(ValueError, match=r"student_layers must lie in \[1, 3\]"):
            LensObjective(student, teacher, layers, [1])
    with pytest.raises(ValueError, match="pair up"):
        LensObjective(student, teacher, [1, 2], [1])


def objective(**options):
    return LensObjective(tiny.model(**STUDENT), tiny.model(**TEACHER), [1, 2], [1, 3], **options)


def test_cross_entropy_is_the_students_own_over_the_shifted_labels():
    goal = objective(kd_ratio=0.5)
    ids = tokens(batch=3)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2, 7:] = -100
    out = goal({"input_ids": ids, "labels": labels})
    with torch.no_grad():
        logits = goal.student(ids).logits
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.sums["ce"] / out.num_tokens, ce, rtol=1e-5, atol=1e-6)
    assert out.num_tokens == (labels[:, 1:] != -100).sum()


def test_right_padding_changes_nothing():
    goal = objective()
    ids = tokens(batch=2)
    out = goal({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    pad = torch.ones(2, 3, dtype=torch.long)
    padded = goal(
        {
            "input_ids": torch.cat([ids, pad], 1),
            "labels": torch.cat([ids, -100 * pad], 1),
            "attention_mask": torch.cat([torch.ones_like(ids), 0 * pad], 1),
        }
    )
    torch.testing.assert_close(out.loss, padded.loss)


def test_evaluation_weighs_batches_by_their_tokens():
    goal = objective()
    ids = tokens(batch=4)
    labels = ids.clone()
    labels[3, 2:] = -100
    whole = evaluate(goal, [{"input_ids": ids, "labels": labels}])
    parts = [
        {"input_ids": i, "labels": x} for i, x in zip(ids.split(3), labels.split(3), strict=True)
    ]
    split = evaluate(goal, parts)
    for key in ("loss", "ce", "kd", "lens", "lens_1", "lens_2"):
        assert split[key] == pytest.approx(whole[key], rel=1e-5), key
    with pytest.raises(ValueError, match="no labelled token"):
        evaluate(goal, [])


def test_the_entropies_of_some_tokens_stand_for_all(monkeypatch):
    ids = torch.full((2, 20), 7)  # so that every position has the same distribution
    batch = {"input_ids": ids, "labels": ids}
    some = objective()(batch).sums
    monkeypatch.setattr("lens_kernels.hf.training.objective.ENTROPY_STRIDE", 1)
    every = objective()(batch).sums
    names = [name for name in every if name.startswith("entropy")]
    assert len(names) == 6
    for name in names:
        torch.testing.assert_close(some[name], every[name], rtol=1e-4, atol=0.0)
