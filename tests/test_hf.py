"""Models read rightly, states captured and released, and a Trainer whose loss is the objective."""

from __future__ import annotations

import copy

import pytest
import torch

from lens_kernels import distillation_loss
from tests import tiny

pytest.importorskip("transformers")
from lens_kernels.hf import (  # noqa: E402
    LensDistillConfig,
    LensDistillTrainer,
    LensObjective,
    capture,
    lens_head_from,
)
from lens_kernels.hf.evaluate import evaluate  # noqa: E402

pytestmark = pytest.mark.hf


def tokens(batch=3, length=10, vocab=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (batch, length), generator=generator)


def test_hooks_are_gone_after_capture_even_after_an_error():
    model = tiny.model()
    with pytest.raises(RuntimeError, match="boom"), capture(model, [1, 2]):
        raise RuntimeError("boom")
    assert not any(m._forward_hooks for m in model.modules())


def test_layers_that_are_no_lens_are_refused():
    student, teacher = tiny.model(layers=4), tiny.model(layers=6)
    for layers in ([4], [0], [7]):
        with pytest.raises(ValueError, match=r"student_layers must lie in \[1, 3\]"):
            LensObjective(student, teacher, layers, [1])
    with pytest.raises(ValueError, match="pair up"):
        LensObjective(student, teacher, [1, 2], [1])
    with pytest.raises(ValueError, match="together, or neither"):
        LensDistillConfig(output_dir="x", student_layers=[1]).layers(student, teacher)


def objective(**options):
    student, teacher = tiny.model(layers=3, seed=1), tiny.model(layers=4, width=24, seed=2)
    return LensObjective(student, teacher, [1, 2], [1, 3], **options)


def test_objective_is_the_function_on_output_hidden_states():
    """Labels are shifted here, and the intermediate states go through the norm."""
    goal = objective(kd_ratio=0.5, lens_coeff=0.3)
    ids = tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2, 7:] = -100
    out = goal({"input_ids": ids, "labels": labels})
    with torch.no_grad():
        hs = goal.student(ids, output_hidden_states=True).hidden_states
        result = goal.teacher(ids, output_hidden_states=True)
        logits = goal.student(ids).logits
    ht = result.hidden_states
    cut = slice(None, -1)
    expected = distillation_loss(
        [hs[1][:, cut], hs[2][:, cut]],
        [ht[1][:, cut], ht[3][:, cut]],
        lens_head_from(goal.student),
        lens_head_from(goal.teacher),
        student_final=hs[-1][:, cut],
        teacher_final=ht[-1][:, cut],
        labels=labels[:, 1:],
        kd_ratio=0.5,
        lens_coeff=0.3,
    )
    torch.testing.assert_close(out.loss, expected.loss)
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.ce, ce, rtol=1e-5, atol=1e-6)
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
    assert evaluate(goal, parts) == pytest.approx(whole, rel=1e-5)
    assert set(whole) == {"ce", "kd", "lens_1", "lens_2"}
    with pytest.raises(ValueError, match="no labelled token"):
        evaluate(goal, [])


def train(tmp_path, batch, accumulate, steps=2, data=None, **options):
    student, teacher = tiny.model(layers=3, seed=1), tiny.model(layers=4, width=24, seed=2)
    start = copy.deepcopy(student.state_dict())
    args = LensDistillConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        num_lens_pairs=2,
        train_sampling_strategy="sequential",
        **options,
    )
    trainer = LensDistillTrainer(student, teacher, args, train_dataset=data or uneven_data())
    trainer.train()
    return student, start, trainer


def uneven_data():
    """Examples with very different numbers of labelled tokens."""
    ids = tokens(batch=8)
    labels = ids.clone()
    for row, kept in enumerate((2, 10, 5, 10, 3, 9, 10, 4)):
        labels[row, kept:] = -100
    return [{"input_ids": i, "labels": x} for i, x in zip(ids, labels, strict=True)]


def test_four_accumulated_batches_of_one_equal_one_batch_of_four(tmp_path):
    options = {"kd_ratio": 0.5, "average_tokens_across_devices": True}
    one, start, first = train(tmp_path, 4, 1, **options)
    four, _, second = train(tmp_path, 1, 4, **options)
    moved = 0.0
    for name, x in one.state_dict().items():
        step = (x - start[name]).abs().max().item()
        moved = max(moved, step)
        assert (x - four.state_dict()[name]).abs().max().item() <= 1e-5 * max(step, 1e-3), name
    assert moved > 1e-2
    logs = [[e for e in t.state.log_history if "kd" in e] for t in (first, second)]
    assert len(logs[0]) == len(logs[1]) == 2
    for a, b in zip(*logs, strict=True):
        for key in ("loss", "ce", "kd", "lens", "lens_1", "lens_2"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
        whole = 0.5 * a["ce"] + 0.5 * (a["kd"] + a["lens"])
        assert a["loss"] == pytest.approx(whole, rel=1e-4)


def test_training_lowers_the_loss_and_leaves_the_teacher_alone(tmp_path):
    student, _, trainer = train(tmp_path, 8, 1, steps=25)
    losses = [e["loss"] for e in trainer.state.log_history if "kd" in e]
    assert losses[-1] < 0.9 * losses[0]
    fresh = tiny.model(layers=4, width=24, seed=2)
    for x, y in zip(trainer.objective.teacher.parameters(), fresh.parameters(), strict=True):
        assert x.grad is None
        torch.testing.assert_close(x, y)


def test_every_option_reaches_the_objective(tmp_path):
    options = {
        "lens_divergence": "hellinger",
        "final_divergence": "forward_kl",
        "beta": 0.3,
        "distill_temperature": 2.0,
        "kd_ratio": 0.25,
        "lens_coeff": 7.0,
    }
    _, _, trainer = train(tmp_path, 4, 1, steps=1, **options)
    assert trainer.objective.options == {
        "divergence": "hellinger",
        "final_divergence": "forward_kl",
        "beta": 0.3,
        "temperature": 2.0,
        "kd_ratio": 0.25,
        "lens_coeff": 7.0,
    }
    layers = {"student_layers": [2], "teacher_layers": [1]}
    _, _, trainer = train(tmp_path, 4, 1, steps=1, **layers)
    assert (trainer.objective.student_layers, trainer.objective.teacher_layers) == ([2], [1])


def test_gradient_checkpointing_gives_the_same_step(tmp_path):
    plain, start, _ = train(tmp_path, 4, 1, steps=1)
    saved, _, _ = train(tmp_path, 4, 1, steps=1, gradient_checkpointing=True)
    for name, x in plain.state_dict().items():
        step = (x - start[name]).abs().max().item()
        assert (x - saved.state_dict()[name]).abs().max().item() <= 1e-5 * max(step, 1e-3), name
