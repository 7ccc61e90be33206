"""The Trainer where its parts meet: the best checkpoint, mixed precision, shared weights, speed."""

from __future__ import annotations

import copy
import threading
import time
import warnings

import pytest
import torch

from tests.support import tiny

pytest.importorskip("transformers")
from accelerate import FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

from lens_kernels.hf import report  # noqa: E402
from lens_kernels.hf import trainer as module  # noqa: E402
from lens_kernels.hf.cache.store import CacheKey, TeacherCache  # noqa: E402
from tests.hf.training.test_trainer import logged, trainer, uneven_data  # noqa: E402

pytestmark = pytest.mark.hf


def test_the_best_checkpoint_brings_its_matrices_of_mse_back(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}
    run = trainer(tmp_path, mse_coeff=0.5, max_steps=4, learning_rate=0.01, **options)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert max(losses) > 1.05 * losses[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


def test_a_cache_made_in_mixed_precision_serves_no_other(tmp_path):
    cache = {"teacher_cache": str(tmp_path / "cache")}
    run = trainer(tmp_path / "a", max_steps=1, bf16=True, **cache)
    run.train()
    plain = trainer(tmp_path / "b", max_steps=1, bf16=True)
    plain.train()
    assert logged(run) == pytest.approx(logged(plain), rel=1e-4)
    with pytest.raises(ValueError, match="another mixed precision: bf16 there, no wanted"):
        trainer(tmp_path / "c", **cache)


def test_with_a_teacher_cache_nothing_else_is_predicted(tmp_path):
    run = trainer(tmp_path, teacher_cache=str(tmp_path / "cache"))
    other = [{**x, "example_id": i} for i, x in enumerate(uneven_data()[:3])]
    with pytest.raises(ValueError, match="give the data as eval_dataset when the trainer is made"):
        run.predict(other)
    assert run.predict(run.eval_dataset).metrics["test_loss"] > 0


def test_a_student_that_is_its_own_teacher_is_refused(tmp_path, monkeypatch):
    student = tiny.model(layers=4, seed=1)
    own = copy.copy(student)  # another object of the same weights
    for teacher in (student, own):
        monkeypatch.setattr(
            "tests.hf.training.test_trainer.tiny.model", lambda *_, t=teacher, **__: t
        )
        with pytest.raises(ValueError, match=r"share 39 parameters, model\.embed_tokens\.weight"):
            trainer(tmp_path, student=student)
        assert all(x.requires_grad for x in student.parameters())
    monkeypatch.setattr(
        "tests.hf.training.test_trainer.tiny.model", lambda *_, **__: copy.deepcopy(own)
    )
    trainer(tmp_path, student=student).train()


def test_labels_are_smoothed_in_fine_tuning_without_a_teacher(tmp_path):
    options = {"kd_ratio": 0.0, "max_steps": 1}
    losses = []
    for smoothing in (0.0, 0.3):
        run = trainer(tmp_path, teacher=False, label_smoothing_factor=smoothing, **options)
        run.train()
        losses += logged(run)
    data = uneven_data()[:4]
    ids, labels = (torch.stack([x[key] for x in data]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        log_p = tiny.model(layers=3, seed=1)(ids).logits[:, :-1].log_softmax(-1)
    uniform = -log_p[labels[:, 1:] != -100].mean().item()
    assert losses[1] == pytest.approx(0.7 * losses[0] + 0.3 * uniform, rel=1e-4)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.3 would not reach"):
        trainer(tmp_path, label_smoothing_factor=0.3, **options)


def test_the_teacher_is_held_still(tmp_path, monkeypatch):
    model = tiny.model
    monkeypatch.setattr(tiny, "model", lambda **options: model(**options).train())
    teacher = trainer(tmp_path).objective.teacher
    assert not any(part.training for part in teacher.modules())
    assert not any(x.requires_grad for x in teacher.parameters())


def test_padding_does_not_count_in_the_speed(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    run = trainer(tmp_path)
    data = uneven_data()[:4]
    batch = {key: torch.stack([x[key] for x in data]) for key in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["labels"])
    batch["attention_mask"][2:, 5:] = 0
    run.compute_loss(run.model.train(), batch)
    clock[0] = 2.0
    run.log({"loss": 0.0})
    assert logged(run, "tokens_per_second") == [(2 * 10 + 2 * 5) / 2.0]


def test_the_speed_is_that_of_training_alone(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=3)
    whole = module.Trainer.evaluation_loop

    def slow(*args, **kwargs):
        time.sleep(2.0)
        return whole(*args, **kwargs)

    monkeypatch.setattr(module.Trainer, "evaluation_loop", slow)
    time.sleep(2.0)  # as a cache takes time before training
    run.train()
    # 80 tokens in two steps, each of milliseconds.
    assert min(logged(run, "tokens_per_second")) > 40


def test_of_two_that_want_a_cache_at_once_one_makes_it_and_one_says_that_it_waits(tmp_path, caplog):
    from tests.hf.cache.test_teacher_cache import LAYERS, Teacher, make_examples

    model, examples = tiny.model(), make_examples()
    key = CacheKey.of(model, examples, LAYERS)
    teachers, caches = [Teacher(model), Teacher(model)], {}
    begun, waits = threading.Event(), threading.Event()

    def make(i):
        def run(batch):
            begun.set()
            assert waits.wait(20)
            return teachers[i](batch)

        caches[i] = TeacherCache.open_or_build(
            tmp_path / "cache", key, examples, run, batch_size=2, shard_examples=2, progress=False
        )

    threads = [threading.Thread(target=make, args=(i,)) for i in (0, 1)]
    threads[0].start()
    assert begun.wait(20)
    assert not caplog.messages
    threads[1].start()
    for _ in range(400):
        if caplog.messages:
            break
        time.sleep(0.05)
    waits.set()
    for thread in threads:
        thread.join(20)
    assert sum(teachers[0].calls) == 9 and not teachers[1].calls
    folder = tmp_path / "cache"
    assert caplog.messages == [f"another process makes the teacher cache {folder}: waiting for it"]
    every = [caches[i].rows(range(9)) for i in (0, 1)]
    assert all(torch.equal(every[0][name], every[1][name]) for name in key.names)


def test_the_matrices_of_mse_begin_from_the_seed_alone(tmp_path, monkeypatch):
    def begin(noise, seed):
        def made(*args, **options):
            torch.manual_seed(noise)  # what a caller did before
            return module.LensDistillTrainer(*args, **options)

        monkeypatch.setattr("tests.hf.training.test_trainer.LensDistillTrainer", made)
        return trainer(tmp_path, mse_coeff=0.5, seed=seed).objective.projections[1].weight

    one, again, other = begin(1, 5), begin(2, 5), begin(1, 6)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_student_holds_the_matrices_of_mse_only_while_it_trains(tmp_path, monkeypatch):
    names = set(tiny.model(layers=3, seed=1).state_dict())
    run = trainer(tmp_path, mse_coeff=0.5, max_steps=1, learning_rate=0.01)
    assert set(run.model.state_dict()) == names
    untrained = run.evaluate()["eval_mse"]
    run.train()
    assert set(run.model.state_dict()) == names
    assert run.evaluate()["eval_mse"] < 0.99 * untrained
    monkeypatch.setattr(run, "training_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert set(run.model.state_dict()) == names


def test_what_mse_learns_is_not_kept_in_sharded_checkpoints(tmp_path, monkeypatch):
    def share(kind):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)

    share("FULL_STATE_DICT")
    trainer(tmp_path, mse_coeff=0.5)
    share("SHARDED_STATE_DICT")
    trainer(tmp_path)
    with pytest.raises(RuntimeError, match="mse_coeff=0.5 needs .* set state_dict_type FULL_STATE"):
        trainer(tmp_path, mse_coeff=0.5)


def test_weights_in_float16_are_not_trained_but_carry_an_adapter(tmp_path):
    student = tiny.model(layers=3, seed=1).to(torch.float16)
    message = r"model has 30 parameters to train in float16, model\.embed_tokens\.weight the first"
    for options in ({}, {"teacher": False, "kd_ratio": 0.0}):
        with pytest.raises(TypeError, match=message):
            trainer(tmp_path, student=student, **options)
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(student, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    run = trainer(tmp_path, student=student, mse_coeff=0.5, optim="adamw_torch")
    run.train()
    assert run.objective.projections[0].weight.dtype == torch.float32
    assert all(x.isfinite().all() for x in run.objective.projections.parameters())


def test_a_student_that_equals_its_teacher_has_a_picture_of_its_loss(tmp_path):
    history = [{"step": i, "loss": 0.0, "kd": 0.0, "lens": 0.0} for i in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a log scale has no place for zeros alone
        report.loss_figure(tmp_path / "zero.png", history, "reverse_kl")
        history.append({"step": 3, "loss": 1.0, "kd": 0.0, "lens": 1.0})
        report.loss_figure(tmp_path / "loss.png", history, "reverse_kl")
    assert (tmp_path / "zero.png").stat().st_size > 5_000


def test_the_matrices_of_mse_stay_trainable_beside_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2)
    student = peft.get_peft_model(tiny.model(layers=3, seed=1), config)
    run = trainer(tmp_path, student=student, mse_coeff=0.5, max_steps=1, learning_rate=0.01)
    start = copy.deepcopy(run.objective.projections)
    run.train()
    for matrix, before in zip(run.objective.projections, start, strict=True):
        assert not torch.equal(matrix.weight, before.weight)
