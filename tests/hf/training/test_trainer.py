"""The trainer: each option has its effect, and equivalent settings give equal steps."""

import copy

import pytest
import torch
from transformers import Trainer

from lens_kernels import distillation_loss
from lens_kernels.hf import LensDistillConfig, LensDistillTrainer, lens_head_from
from lens_kernels.hf.training import meter
from lens_kernels.hf.training.config import final_divergence
from tests.support import tiny
from tests.support.training import (
    STUDENT,
    TEACHER,
    assert_same_step,
    batch_of,
    logged,
    make_trainer,
    tokens,
    trained,
    uneven_data,
    weights,
)

START = tiny.model(**STUDENT).state_dict()


def test_four_accumulated_batches_of_one_equal_one_batch_of_four(tmp_path):
    options = {"kd_ratio": 0.5, "mse_coeff": 0.02}
    one = trained(tmp_path, batch=4, accumulate=1, **options)
    four = trained(tmp_path, batch=1, accumulate=4, **options)
    assert_same_step(START, weights(one), weights(four))
    for key in ("loss", "ce", "kd", "lens", "lens_1", "lens_2", "mse"):
        assert len(logged(one, key)) == 2
        assert logged(one, key) == pytest.approx(logged(four, key), rel=1e-4), key


def test_a_batch_size_that_memory_reduced_trains_on_every_row(tmp_path, monkeypatch):
    step, batches = LensDistillTrainer.training_step, []

    def out_of_memory(self, model, inputs, *args, **kwargs):
        batches.append(len(inputs["labels"]))
        if len(batches) == 1:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LensDistillTrainer, "training_step", out_of_memory)
    found = trained(tmp_path, batch=5, auto_find_batch_size=True)
    assert batches == [5, 4, 4]
    assert logged(found) == pytest.approx(logged(trained(tmp_path, batch=4)), rel=1e-4)


def test_the_logged_loss_is_the_weighted_sum_of_the_logged_parts(tmp_path):
    trainer = trained(tmp_path, kd_ratio=0.25, lens_coeff=3.0, mse_coeff=0.01)
    for entry in trainer.state.log_history[:2]:
        inner = entry["kd"] + 3.0 * entry["lens"] + 0.01 * entry["mse"]
        assert entry["loss"] == pytest.approx(0.75 * entry["ce"] + 0.25 * inner, rel=1e-4)
        assert entry["lens"] == pytest.approx((entry["lens_1"] + entry["lens_2"]) / 2, rel=1e-4)


def expected_loss(data, lens_norm=True, **options):
    """Return the loss of the first step, computed by the library from the models' hidden states."""
    models = tiny.model(**STUDENT), tiny.model(**TEACHER)
    ids, labels = batch_of(data)
    with torch.no_grad():
        hs, ht = (m(ids, output_hidden_states=True).hidden_states for m in models)
    hs, ht = ([x[:, :-1] for x in hidden] for hidden in (hs, ht))
    heads = (lens_head_from(m) if lens_norm else m.lm_head.weight for m in models)
    final = {"student_final": hs[-1], "teacher_final": ht[-1], "labels": labels[:, 1:]}
    out = distillation_loss([hs[1], hs[2]], [ht[1], ht[3]], *heads, **final, **options)
    return out.loss.item()


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("lens_divergence", "divergence", "hellinger"),
        ("lens_divergence", "divergence", "forward_kl"),
        ("final_divergence", "final_divergence", "jsd"),
        ("final_divergence", "final_divergence", "akl"),
        ("beta", "beta", 0.3),
        ("distill_temperature", "temperature", 2.0),
        ("kd_ratio", "kd_ratio", 0.5),
        ("lens_coeff", "lens_coeff", 7.0),
        ("lens_norm", "lens_norm", False),
        ("vocab_size", "vocab_size", 50),
        ("lens_backend", "backend", "reference"),
    ],
)
def test_trainer_options_reach_the_loss_function(tmp_path, option, name, value):
    data = [{"input_ids": x, "labels": x} for x in tokens(vocab=50)]
    trainer = trained(tmp_path, data=data, eval_data=data, max_steps=1, **{option: value})
    (loss,) = logged(trainer)
    assert loss == pytest.approx(expected_loss(data[:4], **{name: value}), rel=1e-4)
    if option == "lens_backend":
        assert trainer.lens_objective.options.backend == value
    else:
        assert loss != pytest.approx(expected_loss(data[:4]), rel=1e-3)


def test_layers_are_given_or_spread_evenly(tmp_path):
    given = {"student_layers": [2], "teacher_layers": [1]}
    for options, layers in ((given, ([2], [1])), ({"num_lens_pairs": 1}, ([2], [2]))):
        objective = make_trainer(tmp_path, **options).lens_objective
        assert (objective.student_layers, objective.teacher_layers) == layers
    for options in ({"num_lens_pairs": 0}, {"lens_coeff": 0.0}):
        entry = trained(tmp_path, max_steps=1, **options).state.log_history[0]
        # Lens pairs with weight 0 are not computed.
        assert "lens" not in entry and "lens_1" not in entry
        assert entry["loss"] == pytest.approx(entry["kd"], rel=1e-5)


def test_models_may_be_given_as_folders(tmp_path, files):
    folders = {name: str(files / name) for name in ("student", "teacher")}
    loss = make_trainer(tmp_path).evaluate()["eval_loss"]
    assert make_trainer(tmp_path, **folders).evaluate()["eval_loss"] == pytest.approx(loss)


def test_fine_tuning_without_a_teacher_gives_the_models_own_loss(tmp_path):
    options = {"teacher": False, "kd_ratio": 0.0, "max_steps": 1}
    trainer = trained(tmp_path, **options)
    ids, labels = batch_of(uneven_data()[:4])
    with torch.no_grad():
        out = tiny.model(**STUDENT)(input_ids=ids, labels=labels)
    for key in ("loss", "ce"):
        assert logged(trainer, key) == pytest.approx([out.loss.item()], rel=1e-4)
    assert trainer.evaluate()["eval_ce"] > 0
    smoothed = trained(tmp_path, label_smoothing_factor=0.3, **options)
    uniform = -out.logits[:, :-1].log_softmax(-1)[labels[:, 1:] != -100].mean().item()
    assert logged(smoothed) == pytest.approx([0.7 * out.loss.item() + 0.3 * uniform], rel=1e-4)


def test_evaluation_reports_every_part_over_tokens_not_batches(tmp_path):
    one, three = (
        make_trainer(tmp_path, per_device_eval_batch_size=size).evaluate() for size in (1, 3)
    )
    for key in ("eval_loss", "eval_ce", "eval_kd", "eval_lens", "eval_lens_1"):
        assert one[key] == pytest.approx(three[key], rel=1e-4), key
    assert one["eval_loss"] == pytest.approx(one["eval_kd"] + one["eval_lens"], rel=1e-4)


def test_logged_entropies_match_the_models_distributions(tmp_path, monkeypatch):
    monkeypatch.setattr("lens_kernels.hf.training.entropy.STRIDE", 1)
    entry = trained(tmp_path, max_steps=1).state.log_history[0]
    ids, labels = batch_of(uneven_data()[:4])
    for side, options, depth in (("student", STUDENT, 2), ("teacher", TEACHER, 3)):
        model = tiny.model(**options)
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
            lens = model.lm_head(model.model.norm(out.hidden_states[depth]))
        for logits, name in ((out.logits, "final"), (lens, depth)):
            log_p = logits[:, :-1][labels[:, 1:] != -100].log_softmax(-1)
            expected = -(log_p.exp() * log_p).sum(-1).mean().item()
            assert entry[f"entropy_{side}_{name}"] == pytest.approx(expected, rel=1e-4)


def test_logged_speed_excludes_evaluation(tmp_path, monkeypatch):
    """On the fake clock, a step takes one second, and everything else takes an hour."""
    now = [0.0]
    monkeypatch.setattr(meter, "perf_counter", lambda: now[0])

    def taking(seconds, kind, name):
        whole = getattr(kind, name)

        def slow(*args, **kwargs):
            now[0] += seconds
            return whole(*args, **kwargs)

        monkeypatch.setattr(kind, name, slow)

    taking(1.0, LensDistillTrainer, "training_step")
    taking(3600.0, Trainer, "evaluation_loop")
    options = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer(tmp_path, **options)
    # The hour before training, in which a cache may be built, does not count.
    now[0] += 3600.0
    trainer.train()
    # Each step takes one second and reads 4 rows of 10 tokens.
    assert logged(trainer, "tokens_per_second") == [40.0, 40.0]


def test_gradient_checkpointing_gives_the_same_step(tmp_path):
    plain, saving = (
        trained(tmp_path, max_steps=1, gradient_checkpointing=x) for x in (False, True)
    )
    assert saving.model.is_gradient_checkpointing
    assert_same_step(START, weights(plain), weights(saving))


def test_training_leaves_no_hooks_and_does_not_change_the_teacher(tmp_path):
    trainer = make_trainer(tmp_path, batch=8, max_steps=12)
    models = trainer.model, trainer.lens_objective.teacher
    calls = []
    for model in models:
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert logged(trainer)[-1] < 0.9 * logged(trainer)[0]
    # Training must not call the models' own heads.
    assert not calls
    for model in models:
        assert "forward" not in vars(model)
        assert not any(block._forward_hooks for block in model.model.layers)
    for x, y in zip(models[1].parameters(), tiny.model(**TEACHER).parameters(), strict=True):
        assert x.grad is None and torch.equal(x, y)


def test_models_that_share_parameters_are_refused(tmp_path):
    student = tiny.model(layers=4, seed=1)
    for teacher in (student, copy.copy(student)):  # copy.copy shares all weights
        with pytest.raises(ValueError, match=r"share 39 parameters, such as model\.embed_tokens"):
            make_trainer(tmp_path, student=student, teacher=teacher)
        assert all(x.requires_grad for x in student.parameters())
    make_trainer(tmp_path, student=student, teacher=copy.deepcopy(student))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lens_divergence", "kl", "lens_divergence='kl' is unknown; choose one of 'jsd'"),
        ("final_divergence", "0.5*akl+jsd", r"final_divergence='0.5\*akl\+jsd' is unknown"),
        ("final_divergence", "-1*jsd", "final_divergence"),
        ("final_divergence", "jsd+jsd", "different names"),
        ("beta", 1.0, "beta must be finite and lie between 0 and 1, got 1.0"),
        ("kd_ratio", 1.5, r"kd_ratio must be finite and lie in \[0, 1\], got 1.5"),
        ("lens_coeff", -1.0, "lens_coeff must be finite"),
        ("mse_coeff", -1.0, "mse_coeff must be finite"),
        ("distill_temperature", 0.0, "distill_temperature must be finite"),
        ("num_lens_pairs", -1, "num_lens_pairs must be at least 0, got -1"),
        ("student_layers", [1], "student_layers and teacher_layers together, or neither"),
        ("torch_compile", True, "torch_compile=True is not supported"),
        ("label_smoothing_factor", 0.1, "label_smoothing_factor=0.1 has no effect"),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}, "would block the gradients"),
        ("grad_threshold", "fp8", "grad_threshold='fp8' is unknown; choose one of 'bf16'"),
        ("grad_threshold", "-1", "grad_threshold must be finite and lie in"),
    ],
)
def test_config_refuses_bad_options(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        LensDistillConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_lens_pairs": 3}, "num_lens_pairs must be at most 2 for a .*got 3: set a"),
        ({"num_lens_pairs": 0, "mse_coeff": 1.0}, "mse_coeff needs at least one pair"),
        ({"student": tiny.model(layers=3, vocab=70)}, r"64.*70|70.*64"),
        ({"teacher": False}, "teacher is None: give a teacher, or kd_ratio=0"),
        ({"label_smoothing_factor": 0.3, "kd_ratio": 0.0}, "factor=0.3 has no effect"),
    ],
    ids=["pairs", "no pair", "vocabulary", "no teacher", "smoothing"],
)
def test_trainer_refuses_options_that_do_not_fit_the_models(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_final_divergence_may_be_a_weighted_sum(tmp_path):
    assert final_divergence("akl") == "akl"
    assert final_divergence("1e-1 * jsd") == {"jsd": 0.1}
    assert final_divergence("0.5*forward_kl+reverse_kl") == {"forward_kl": 0.5, "reverse_kl": 1.0}
    trainer = trained(tmp_path, max_steps=1, final_divergence="0.5*forward_kl + 2*reverse_kl")
    weights = {"forward_kl": 0.5, "reverse_kl": 2.0}
    expected = expected_loss(uneven_data()[:4], final_divergence=weights)
    assert logged(trainer) == pytest.approx([expected], rel=1e-4)


def test_teacher_is_in_eval_mode_without_gradients(tmp_path):
    teacher = make_trainer(tmp_path, teacher=tiny.model(**TEACHER).train()).lens_objective.teacher
    assert not any(part.training for part in teacher.modules())
    assert not any(x.requires_grad for x in teacher.parameters())


def test_logged_speed_excludes_padding(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(meter, "perf_counter", lambda: clock[0])
    trainer = make_trainer(tmp_path)
    ids, labels = batch_of(uneven_data()[:4])
    mask = torch.ones_like(ids)
    mask[2:, 5:] = 0
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    trainer.compute_loss(trainer.model.train(), batch)
    clock[0] = 2.0
    trainer.log({"loss": 0.0})
    assert logged(trainer, "tokens_per_second") == [(2 * 10 + 2 * 5) / 2.0]


def test_a_hyperparameter_search_leaves_the_lens_objective(tmp_path):
    trainer = make_trainer(tmp_path)
    # transformers' hyperparameter search stores the score of a trial in the attribute
    # ``objective``.
    trainer.objective = 0.5
    trainer.train()
    assert trainer.lens_objective is not None and trainer.state.log_history[0]["lens"] > 0


def test_fine_tuning_stores_no_logits(tmp_path):
    """Training and evaluation run the model's head only if the model computes the loss."""
    trainer = make_trainer(tmp_path, teacher=False, kd_ratio=0.0)
    heads = []
    trainer.model.lm_head.register_forward_hook(lambda *args: heads.append(args))
    batch = dict(zip(("input_ids", "labels"), batch_of(uneven_data()[:3]), strict=True))
    fused = trainer.compute_loss(trainer.model, dict(batch))
    trainer.prediction_step(trainer.model, dict(batch), True)
    assert not heads
    trainer._own_loss = True
    own = trainer.compute_loss(trainer.model, dict(batch))
    assert len(heads) == 1 and fused.item() == pytest.approx(own.item(), rel=1e-5)
    grads = [torch.autograd.grad(loss, trainer.model.lm_head.weight)[0] for loss in (fused, own)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
