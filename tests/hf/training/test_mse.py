"""The MSE loss between hidden states: its value, and how its matrices are trained and saved."""

import copy

import peft
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.support import tiny
from tests.support.training import (
    STUDENT,
    TEACHER,
    batch_of,
    logged,
    make_trainer,
    trained,
    uneven_data,
    weights,
)

MSE = {"mse_coeff": 0.5, "learning_rate": 0.01}


def test_mse_term_is_the_mean_square_over_counted_tokens(tmp_path):
    trainer = make_trainer(tmp_path, lens_coeff=0.0, max_steps=1, **MSE)
    start = copy.deepcopy(trainer.lens_objective.projections)
    ids, labels = batch_of(uneven_data()[:4])
    counted = labels[:, 1:] != -100
    with torch.no_grad():
        hs, ht = (
            tiny.model(**model)(ids, output_hidden_states=True).hidden_states
            for model in (STUDENT, TEACHER)
        )
        pairs = zip(start, (hs[1], hs[2]), (ht[1], ht[3]), strict=True)
        squares = [(m(t) - s)[:, :-1][counted].square().mean() for m, s, t in pairs]
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["mse"] == pytest.approx(torch.stack(squares).mean().item(), rel=1e-4)
    assert entry["loss"] == pytest.approx(entry["kd"] + 0.5 * entry["mse"], rel=1e-4)


def test_student_holds_the_projections_only_during_training(tmp_path, monkeypatch):
    names = set(tiny.model(**STUDENT).state_dict())
    trainer = make_trainer(tmp_path, max_steps=1, **MSE)
    assert set(trainer.model.state_dict()) == names
    untrained = trainer.evaluate()["eval_mse"]
    trainer.train()
    assert set(trainer.model.state_dict()) == names
    assert trainer.evaluate()["eval_mse"] < 0.99 * untrained
    monkeypatch.setattr(trainer, "training_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert set(trainer.model.state_dict()) == names


def test_checkpoints_restore_the_projections(tmp_path):
    options = MSE | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = weights(trained(tmp_path / "a", **options))
    folder = tmp_path / "a" / "checkpoint-2"
    assert load_file(folder / "model.safetensors").keys() <= whole.keys()
    resumed = make_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(folder))
    for name, x in weights(resumed).items():
        torch.testing.assert_close(x, whole[name], rtol=0, atol=1e-6, msg=name)


def test_loading_the_best_checkpoint_restores_its_projections(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}
    trainer = trained(tmp_path, max_steps=4, **MSE, **options)
    losses = logged(trainer, "eval_loss", having="eval_loss")
    assert max(losses) > 1.05 * losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


def test_initial_projections_depend_only_on_the_seed(tmp_path):
    def first(noise, seed):
        student = tiny.model(**STUDENT)
        # The matrices must not depend on the global random state.
        torch.manual_seed(noise)
        trainer = make_trainer(tmp_path, mse_coeff=0.5, seed=seed, student=student)
        return trainer.lens_objective.projections[1].weight

    one, again, other = first(1, 5), first(2, 5), first(1, 6)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_mse_refuses_sharded_checkpoints(tmp_path, monkeypatch):
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
        make_trainer(tmp_path, mse_coeff=0.5 * (kind == "FULL_STATE_DICT"))
    with pytest.raises(RuntimeError, match="mse_coeff=0.5 needs .* set state_dict_type FULL_STATE"):
        make_trainer(tmp_path, mse_coeff=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_projections_are_trained_with_an_adapter(tmp_path, dtype):
    student = tiny.model(**STUDENT).to(dtype)
    student = peft.get_peft_model(student, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    trainer = make_trainer(tmp_path, student=student, optim="adamw_torch", **MSE)
    start = copy.deepcopy(trainer.lens_objective.projections)
    trainer.train()
    for matrix, before in zip(trainer.lens_objective.projections, start, strict=True):
        assert matrix.weight.dtype == torch.float32 and matrix.weight.isfinite().all()
        assert not torch.equal(matrix.weight, before.weight)


def test_training_float16_weights_is_refused(tmp_path):
    student = tiny.model(**STUDENT).to(torch.float16)
    message = r"model has 30 trainable parameters in float16, such as model\.embed_tokens\.weight"
    for options in ({}, {"teacher": False, "kd_ratio": 0.0}):
        with pytest.raises(TypeError, match=message):
            make_trainer(tmp_path, student=student, **options)
