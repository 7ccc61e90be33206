"""The Trainer: every option does what it says, and equal settings give equal steps."""

from __future__ import annotations

import copy

import pytest
import torch

from lens_kernels import distillation_loss
from tests.support import tiny

pytest.importorskip("transformers")
from lens_kernels.hf import LensDistillConfig, LensDistillTrainer, lens_head_from  # noqa: E402
from lens_kernels.hf.training.config import final_divergence  # noqa: E402

pytestmark = pytest.mark.hf


def tokens(batch=8, length=10, vocab=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (batch, length), generator=generator)


def uneven_data():
    """Examples with very different numbers of labelled tokens; the first has one that counts."""
    ids = tokens()
    labels = ids.clone()
    for row, kept in enumerate((2, 10, 5, 10, 3, 9, 10, 4)):
        labels[row, kept:] = -100
    return [{"input_ids": i, "labels": x} for i, x in zip(ids, labels, strict=True)]


def trainer(tmp_path, batch=4, accumulate=1, data=None, student=None, teacher=True, **options):
    args = {
        "max_steps": 2,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "num_lens_pairs": 2,
        "save_strategy": "no",
        "report_to": "none",
        "train_sampling_strategy": "sequential",
    }
    config = LensDistillConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        disable_tqdm=True,
        use_cpu=True,
        **args | options,
    )
    return LensDistillTrainer(
        student or tiny.model(layers=3, seed=1),
        tiny.model(layers=4, width=24, seed=2) if teacher else None,
        config,
        train_dataset=data or uneven_data(),
        eval_dataset=uneven_data()[:3],
    )


def train(tmp_path, **options):
    """Return the student's parameters before and after, and the trainer."""
    run = trainer(tmp_path, **options)
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    run.train()
    return before, run.model.state_dict(), run


def logged(run, key="loss"):
    return [entry[key] for entry in run.state.log_history if "loss" in entry]


def assert_same_step(start, one, other, relative=1e-5):
    moved = 0.0
    for name, x in one.items():
        step = (x - start[name]).abs().max().item()
        moved = max(moved, step)
        assert (x - other[name]).abs().max().item() <= relative * max(step, 1e-3), name
    assert moved > 1e-2


def test_four_accumulated_batches_of_one_equal_one_batch_of_four(tmp_path):
    start, one, first = train(tmp_path, batch=4, accumulate=1, kd_ratio=0.5, mse_coeff=0.02)
    _, four, second = train(tmp_path, batch=1, accumulate=4, kd_ratio=0.5, mse_coeff=0.02)
    assert_same_step(start, one, four)
    for key in ("loss", "ce", "kd", "lens", "lens_1", "lens_2", "mse"):
        assert len(logged(first, key)) == 2
        assert logged(first, key) == pytest.approx(logged(second, key), rel=1e-4), key


def test_the_logged_loss_is_the_weighted_sum_of_the_logged_parts(tmp_path):
    options = {"kd_ratio": 0.25, "lens_coeff": 3.0, "mse_coeff": 0.01}
    _, _, run = train(tmp_path, **options)
    for entry in run.state.log_history[:2]:
        inner = entry["kd"] + 3.0 * entry["lens"] + 0.01 * entry["mse"]
        assert entry["loss"] == pytest.approx(0.75 * entry["ce"] + 0.25 * inner, rel=1e-4)
        assert entry["lens"] == pytest.approx((entry["lens_1"] + entry["lens_2"]) / 2, rel=1e-4)
        assert entry["tokens_per_second"] > 0


def expected_loss(run, data, **options):
    """Return the first step's loss, from the models' own hidden states."""
    student, teacher = tiny.model(layers=3, seed=1), tiny.model(layers=4, width=24, seed=2)
    ids = torch.stack([x["input_ids"] for x in data])
    labels = torch.stack([x["labels"] for x in data])
    with torch.no_grad():
        hs = student(ids, output_hidden_states=True).hidden_states
        ht = teacher(ids, output_hidden_states=True).hidden_states
    cut = slice(None, -1)
    out = distillation_loss(
        [hs[1][:, cut], hs[2][:, cut]],
        [ht[1][:, cut], ht[3][:, cut]],
        options.pop("student_head", lens_head_from(student)),
        options.pop("teacher_head", lens_head_from(teacher)),
        student_final=hs[-1][:, cut],
        teacher_final=ht[-1][:, cut],
        labels=labels[:, 1:],
        **options,
    )
    return out.loss.item()


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"lens_divergence": "hellinger"}, {"divergence": "hellinger"}),
        ({"lens_divergence": "forward_kl"}, {"divergence": "forward_kl"}),
        ({"lens_divergence": "reverse_kl"}, {"divergence": "reverse_kl"}),
        ({"lens_divergence": "jeffreys"}, {"divergence": "jeffreys"}),
        ({"lens_divergence": "tvd"}, {"divergence": "tvd"}),
        ({"final_divergence": "forward_kl"}, {"final_divergence": "forward_kl"}),
        ({"final_divergence": "jsd"}, {"final_divergence": "jsd"}),
        ({"final_divergence": "akl"}, {"final_divergence": "akl"}),
        (
            {"final_divergence": "0.5*forward_kl + 2*reverse_kl"},
            {"final_divergence": {"forward_kl": 0.5, "reverse_kl": 2.0}},
        ),
        ({"beta": 0.3}, {"beta": 0.3}),
        ({"distill_temperature": 2.0}, {"temperature": 2.0}),
        ({"kd_ratio": 0.5}, {"kd_ratio": 0.5}),
        ({"lens_coeff": 7.0}, {"lens_coeff": 7.0}),
        ({"vocab_size": 50}, {"vocab_size": 50}),
        ({"lens_backend": "reference"}, {"backend": "reference"}),
    ],
    ids=str,
)
def test_an_option_of_the_objective_is_that_of_the_function(tmp_path, options, same):
    ids = tokens(vocab=50)
    data = [{"input_ids": x, "labels": x} for x in ids]
    run = trainer(tmp_path, data=data, max_steps=1, **options)
    run.train()
    loss = logged(run)[0]
    assert loss == pytest.approx(expected_loss(run, data[:4], **same), rel=1e-4)
    if "lens_backend" not in options:
        assert loss != pytest.approx(expected_loss(run, data[:4]), rel=1e-3)
    else:
        assert run.objective.options["backend"] == "reference"


def test_lenses_without_the_norm(tmp_path):
    run = trainer(tmp_path, max_steps=1, lens_norm=False)
    run.train()
    bare = {
        "student_head": tiny.model(layers=3, seed=1).lm_head.weight,
        "teacher_head": tiny.model(layers=4, width=24, seed=2).lm_head.weight,
    }
    expected = expected_loss(run, uneven_data()[:4], **bare)
    assert logged(run)[0] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(expected_loss(run, uneven_data()[:4]), rel=1e-3)


def test_layers_given_and_counted(tmp_path):
    run = trainer(tmp_path, student_layers=[2], teacher_layers=[1])
    assert (run.objective.student_layers, run.objective.teacher_layers) == ([2], [1])
    run = trainer(tmp_path, num_lens_pairs=1)
    assert (run.objective.student_layers, run.objective.teacher_layers) == ([2], [2])
    run = trainer(tmp_path, num_lens_pairs=0, max_steps=1)
    run.train()
    assert "lens" not in run.state.log_history[0]
    assert logged(run)[0] == pytest.approx(run.state.log_history[0]["kd"], rel=1e-5)


def test_a_lens_without_weight_is_not_computed(tmp_path):
    run = trainer(tmp_path, lens_coeff=0.0, max_steps=1)
    run.train()
    assert "lens_1" not in run.state.log_history[0]


def test_mse_is_the_mean_square_and_its_matrices_learn(tmp_path):
    run = trainer(tmp_path, mse_coeff=0.5, lens_coeff=0.0, max_steps=1, learning_rate=0.01)
    matrices = run.objective.projections
    start = copy.deepcopy(matrices)
    data = uneven_data()[:4]
    ids = torch.stack([x["input_ids"] for x in data])
    counted = torch.stack([x["labels"] for x in data])[:, 1:] != -100
    teacher = tiny.model(layers=4, width=24, seed=2)
    with torch.no_grad():
        hs = tiny.model(layers=3, seed=1)(ids, output_hidden_states=True).hidden_states
        ht = teacher(ids, output_hidden_states=True).hidden_states
        pairs = zip(start, (hs[1], hs[2]), (ht[1], ht[3]), strict=True)
        squares = [(m(t) - s)[:, :-1][counted].square().mean() for m, s, t in pairs]
    run.train()
    entry = run.state.log_history[0]
    assert entry["mse"] == pytest.approx(torch.stack(squares).mean().item(), rel=1e-4)
    assert entry["loss"] == pytest.approx(entry["kd"] + 0.5 * entry["mse"], rel=1e-4)
    for matrix, before in zip(matrices, start, strict=True):
        assert not torch.equal(matrix.weight, before.weight)


def test_models_may_be_given_as_folders(tmp_path):
    tiny.model(layers=3, seed=1).save_pretrained(tmp_path / "student")
    tiny.model(layers=4, width=24, seed=2).save_pretrained(tmp_path / "teacher")
    config = LensDistillConfig(output_dir=str(tmp_path), num_lens_pairs=2, use_cpu=True)
    folders = str(tmp_path / "student"), str(tmp_path / "teacher")
    run = LensDistillTrainer(*folders, config, train_dataset=uneven_data())
    assert run.evaluate(uneven_data())["eval_loss"] == pytest.approx(
        trainer(tmp_path).evaluate(uneven_data())["eval_loss"], rel=1e-5
    )


def test_the_matrices_of_mse_are_saved_beside_the_student_and_resumed(tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    options = {"mse_coeff": 0.5, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    _, whole, _ = train(tmp_path / "a", learning_rate=0.01, **options)
    folder = tmp_path / "a" / "checkpoint-2"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "mse" in name]  # noqa: SIM118
    AutoModelForCausalLM.from_pretrained(folder)
    run = trainer(tmp_path / "b", learning_rate=0.01, **options)
    run.train(resume_from_checkpoint=str(folder))
    for name, x in run.model.state_dict().items():
        torch.testing.assert_close(x, whole[name], rtol=0, atol=1e-6, msg=name)


def test_fine_tuning_needs_no_teacher_and_is_the_models_own_loss(tmp_path):
    _, _, run = train(tmp_path, teacher=False, kd_ratio=0.0, max_steps=1)
    data = uneven_data()[:4]
    batch = {key: torch.stack([x[key] for x in data]) for key in ("input_ids", "labels")}
    expected = tiny.model(layers=3, seed=1)(**batch).loss.item()
    assert logged(run)[0] == pytest.approx(expected, rel=1e-4)
    assert run.state.log_history[0]["ce"] == pytest.approx(expected, rel=1e-4)
    assert run.evaluate()["eval_ce"] > 0
    with pytest.raises(ValueError, match="teacher is None: give a teacher, or kd_ratio=0"):
        trainer(tmp_path, teacher=False)


def test_evaluation_reports_every_part_over_tokens_not_batches(tmp_path):
    options = {"per_device_eval_batch_size": 1}
    one = trainer(tmp_path, **options).evaluate()
    three = trainer(tmp_path, per_device_eval_batch_size=3).evaluate()
    for key in ("eval_loss", "eval_ce", "eval_kd", "eval_lens", "eval_lens_1"):
        assert one[key] == pytest.approx(three[key], rel=1e-4), key
    assert one["eval_loss"] == pytest.approx(one["eval_kd"] + one["eval_lens"], rel=1e-4)


def test_logged_entropies_are_of_the_models_distributions(tmp_path, monkeypatch):
    monkeypatch.setattr("lens_kernels.hf.training.objective.ENTROPY_STRIDE", 1)
    run = trainer(tmp_path, max_steps=1)
    run.train()
    data = uneven_data()[:4]
    ids = torch.stack([x["input_ids"] for x in data])
    counted = torch.stack([x["labels"] for x in data])[:, 1:] != -100
    for side, model, depth in (
        ("student", tiny.model(layers=3, seed=1), 2),
        ("teacher", tiny.model(layers=4, width=24, seed=2), 3),
    ):
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
            lens = model.lm_head(model.model.norm(out.hidden_states[depth]))
        for logits, name in ((out.logits, "final"), (lens, depth)):
            log_p = logits[:, :-1][counted].log_softmax(-1)
            expected = -(log_p.exp() * log_p).sum(-1).mean().item()
            entry = run.state.log_history[0][f"entropy_{side}_{name}"]
            assert entry == pytest.approx(expected, rel=1e-4), (side, name)


def test_gradient_checkpointing_gives_the_same_step(tmp_path):
    start, plain, _ = train(tmp_path, max_steps=1)
    _, saved, run = train(tmp_path, max_steps=1, gradient_checkpointing=True)
    assert run.model.is_gradient_checkpointing
    assert_same_step(start, plain, saved)


def test_no_head_runs_and_no_hook_or_forward_is_left(tmp_path):
    run = trainer(tmp_path)
    calls = []
    for model in (run.model, run.objective.teacher):
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    run.train()
    assert not calls
    for model in (run.model, run.objective.teacher):
        assert "forward" not in vars(model)
        assert not any(block._forward_hooks for block in model.model.layers)


def test_training_leaves_the_teacher_alone(tmp_path):
    _, _, run = train(tmp_path, batch=8, max_steps=25)
    assert logged(run)[-1] < 0.9 * logged(run)[0]
    fresh = tiny.model(layers=4, width=24, seed=2)
    for x, y in zip(run.objective.teacher.parameters(), fresh.parameters(), strict=True):
        assert x.grad is None
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_teacher_cache_gives_the_same_training_and_the_teacher_never_runs(tmp_path, accumulate):
    options = {"max_steps": -1, "num_train_epochs": 2, "batch": 2, "accumulate": accumulate}
    options["train_sampling_strategy"] = "random"
    options["learning_rate"] = 0.05
    plain = trainer(tmp_path / "a", **options)
    plain.train()
    cached = trainer(tmp_path / "b", teacher_cache=str(tmp_path / "cache"), **options)
    assert cached.objective.teacher is None
    cached.train()
    assert len(logged(plain)) == 8 // accumulate
    for key in ("loss", "kd", "lens_1"):
        assert logged(cached, key) == pytest.approx(logged(plain, key), rel=1e-5), key
    assert cached.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    third = trainer(tmp_path / "c", teacher_cache=str(tmp_path / "cache"), **options)
    third.train()
    assert logged(third) == logged(cached)


def test_with_a_teacher_cache_only_the_trainers_own_data_can_be_had(tmp_path):
    run = trainer(tmp_path, teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="give the data as eval_dataset when the trainer is made"):
        run.evaluate(uneven_data()[:3])
    assert run.evaluate(run.eval_dataset)["eval_loss"] > 0
    with pytest.raises(TypeError, match="train_dataset of known length.* got a generator"):
        trainer(tmp_path, teacher_cache=str(tmp_path / "other"), data=(x for x in uneven_data()))


def test_the_teacher_cache_dtype_rounds(tmp_path):
    run = trainer(tmp_path, teacher_cache=str(tmp_path / "cache"), teacher_cache_dtype="bfloat16")
    run.train()
    plain = trainer(tmp_path / "plain")
    plain.train()
    error = abs(logged(run)[0] / logged(plain)[0] - 1)
    assert 1e-7 < error < 2e-2


def test_a_teacher_cache_of_another_run_is_refused(tmp_path):
    cache = str(tmp_path / "cache")
    trainer(tmp_path, teacher_cache=cache)
    with pytest.raises(ValueError, match="layers"):
        trainer(tmp_path, teacher_cache=cache, num_lens_pairs=1)
    other = [*reversed(uneven_data())]
    with pytest.raises(ValueError, match="data"):
        trainer(tmp_path, teacher_cache=cache, data=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lens_divergence": "kl"}, "lens_divergence='kl' is unknown; choose one of 'jsd'"),
        ({"final_divergence": "0.5*akl+jsd"}, r"final_divergence='0.5\*akl\+jsd' is unknown"),
        ({"final_divergence": "-1*jsd"}, "final_divergence"),
        ({"final_divergence": "jsd+jsd"}, "different ones"),
        ({"beta": 1.0}, "beta must be finite and lie between 0 and 1, got 1.0"),
        ({"kd_ratio": 1.5}, r"kd_ratio must be finite and lie in \[0, 1\], got 1.5"),
        ({"lens_coeff": -1.0}, "lens_coeff must be finite"),
        ({"mse_coeff": -1.0}, "mse_coeff must be finite"),
        ({"distill_temperature": 0.0}, "distill_temperature must be finite"),
        ({"num_lens_pairs": -1}, "num_lens_pairs must be at least 0, got -1"),
        ({"student_layers": [1]}, "student_layers and teacher_layers together, or neither"),
        ({"torch_compile": True}, "torch_compile=True is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is for fine-tuning alone"),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "'use_reentrant': True.* would cut the lenses off",
        ),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_before_a_model_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        LensDistillConfig(output_dir=str(tmp_path), **options)


def test_what_does_not_fit_the_models_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"num_pairs must lie in \[1, 2\].*got 3"):
        trainer(tmp_path, num_lens_pairs=3)
    with pytest.raises(ValueError, match="mse_coeff needs at least one pair"):
        trainer(tmp_path, num_lens_pairs=0, mse_coeff=1.0)
    with pytest.raises(ValueError, match=r"64.*60|60.*64"):
        trainer(tmp_path, student=tiny.model(layers=3, vocab=60))


def test_weighted_sums_of_divergences_are_read():
    assert final_divergence("akl") == "akl"
    assert final_divergence("0.5*forward_kl+reverse_kl") == {"forward_kl": 0.5, "reverse_kl": 1.0}
    assert final_divergence("1e-1 * jsd") == {"jsd": 0.1}
