"""The objective of two models on a batch, and its hooks on the models, which are removed."""

import pytest
import torch

from lens_kernels.hf import LensObjective, capture
from lens_kernels.hf.model.state import replaced_forward
from lens_kernels.hf.training.collation import Collator
from lens_kernels.hf.training.meter import evaluate
from tests.support import tiny
from tests.support.training import STUDENT, TEACHER, batch_of, make_trainer, tokens, uneven_data


def test_capture_restores_the_model_even_after_an_error():
    model = tiny.model()
    with pytest.raises(RuntimeError, match="boom"), capture(model, [1, 2]):
        raise RuntimeError("boom")
    assert not any(m._forward_hooks for m in model.modules())
    for before in (None, lambda **_: "earlier"):
        if before is not None:
            model.forward = before
        with pytest.raises(RuntimeError, match="boom"), replaced_forward(model, lambda **_: "now"):
            assert model(input_ids=1) == "now"
            raise RuntimeError("boom")
        assert vars(model).get("forward") is before


def test_lens_objective_refuses_bad_layers():
    models = tiny.model(layers=4), tiny.model(layers=6)
    with pytest.raises(ValueError, match=r"student_layers must lie in \[1, 3\], got 4"):
        LensObjective(*models, [4], [1])
    with pytest.raises(ValueError, match="pair up"):
        LensObjective(*models, [1, 2], [1])
    with pytest.raises(TypeError, match="teacher must be one model, got 2: for several teachers"):
        LensObjective.from_models(models[0], [*models])


def objective(**options):
    return LensObjective(tiny.model(**STUDENT), tiny.model(**TEACHER), [1, 2], [1, 3], **options)


def test_cross_entropy_equals_the_students_own_loss():
    goal, (ids, labels) = objective(kd_ratio=0.5), batch_of(uneven_data()[:3])
    out = goal({"input_ids": ids, "labels": labels})
    with torch.no_grad():
        ce = goal.student(ids, labels=labels).loss
    torch.testing.assert_close(out.sums["ce"] / out.num_tokens, ce, rtol=1e-5, atol=1e-6)
    assert out.num_tokens == (labels[:, 1:] != -100).sum()


def test_right_padding_does_not_change_the_loss():
    ids = tokens(batch=2)
    whole = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    fill = {"input_ids": 1, "labels": -100, "attention_mask": 0}
    padded = {k: torch.nn.functional.pad(x, (0, 3), value=fill[k]) for k, x in whole.items()}
    torch.testing.assert_close(objective()(whole).loss, objective()(padded).loss)


def test_evaluate_weighs_batches_by_their_tokens():
    goal, data = objective(), uneven_data()[:4]
    whole, *split = (
        dict(zip(("input_ids", "labels"), batch_of(x), strict=True))
        for x in (data, data[:3], data[3:])
    )
    whole, split = evaluate(goal, [whole]), evaluate(goal, split)
    for key in ("loss", "ce", "kd", "lens", "lens_1", "lens_2"):
        assert split[key] == pytest.approx(whole[key], rel=1e-5), key
    with pytest.raises(ValueError, match="the batches hold no label"):
        evaluate(goal, [])


def test_sampled_entropies_are_scaled_to_all_tokens(monkeypatch):
    # All tokens are equal, so the distributions at all positions are equal.
    ids = torch.full((2, 20), 7)
    some = objective()({"input_ids": ids, "labels": ids}).sums
    monkeypatch.setattr("lens_kernels.hf.training.entropy.STRIDE", 1)
    every = objective()({"input_ids": ids, "labels": ids}).sums
    names = [name for name in every if name.startswith("entropy")]
    assert len(names) == 6
    for name in names:
        torch.testing.assert_close(some[name], every[name], rtol=1e-4, atol=0.0)


def parts(examples, **options):
    """Return the terms of the loss in float64, for a batch of these examples."""
    models = [tiny.model(**x, **options).double() for x in (STUDENT, TEACHER)]
    out = LensObjective(*models, [1, 2], [1, 3], kd_ratio=0.5)(Collator(1)(examples))
    return {name: (x / out.num_tokens).item() for name, x in out.sums.items()}


def test_masks_and_positions_of_the_data_reach_the_models():
    (ids,) = tokens(batch=1, length=6).tolist()
    plain = {"input_ids": ids, "labels": ids}
    left = {
        "input_ids": [9, 9, 9, *ids],
        "labels": [-100, -100, -100, -100, *ids[1:]],
        "attention_mask": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    }
    longer = tokens(batch=1, length=12).tolist()[0]
    # Llama computes relative positions, so the mask is enough. GPT-2 also needs ``position_ids``.
    other = {"input_ids": longer, "labels": [-100] * 12, "attention_mask": [1] * 12}
    names = ("loss", "ce", "kd", "lens_1", "lens_2")
    expected, found = parts([plain]), parts([left, other])
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    placed = {**left, "position_ids": [0, 0, 0, *range(6)]}
    expected, found = (parts([x], kind="gpt2") for x in (plain, placed))
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("fine_tune", [False, True])
def test_labels_of_another_width_are_refused(tmp_path, fine_tune):
    ids = tokens(batch=2, length=5)
    message = r"labels have shape \(2, 4\), but input_ids have \(2, 5\): give one label per token"
    batch = {"input_ids": ids, "labels": ids[:, 1:]}
    options = {"teacher": False, "kd_ratio": 0.0} if fine_tune else {}
    trainer = make_trainer(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(trainer.model, batch)
    with pytest.raises(ValueError, match=r"no labels, only input_ids: give data with"):
        trainer.compute_loss(trainer.model, {"input_ids": ids})
    with pytest.raises(ValueError, match=r"no labels, only input_ids: give data with"):
        trainer.prediction_step(trainer.model, {"input_ids": ids}, True)


def test_objective_is_a_module_of_the_student_alone():
    student, teacher = tiny.model(**STUDENT), tiny.model(**TEACHER).train()
    goal = LensObjective.from_models(student, teacher, num_lens_pairs=2, mse_coeff=0.1)
    assert goal.student_layers == [1, 2] and goal.teacher_layers == [1, 3]
    own = {*student.parameters(), *goal.projections.parameters()}
    assert {*goal.parameters()} == own and len(own) > len({*student.parameters()})
    assert not any(x.requires_grad for x in teacher.parameters())
    goal.train()
    assert student.training and not teacher.training
    ids, labels = batch_of(uneven_data()[:3])
    outcome = goal({"input_ids": ids, "labels": labels})
    outcome.loss.backward()
    assert all(x.grad is not None for x in own) and all(
        x.grad is None for x in teacher.parameters()
    )
    assert outcome.metrics["loss"] == pytest.approx(outcome.loss.item(), rel=1e-6)
    parts = [outcome.metrics[name] for name in ("lens_1", "lens_2")]
    assert outcome.metrics["lens"] == pytest.approx(sum(parts) / 2, rel=1e-6)
