"""Training with a cache of the teacher's states on disk."""

import pytest
from safetensors import safe_open

from lens_kernels.hf import LensDistillTrainer
from tests.support.training import logged, make_trainer, trained, uneven_data


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cached_training_equals_plain_training_without_the_teacher(tmp_path, accumulate):
    options = {"max_steps": -1, "num_train_epochs": 2, "batch": 2, "accumulate": accumulate}
    # The tests' default trainer does not shuffle its data, but LensDistillTrainer does.
    options |= {"learning_rate": 0.05, "kind": LensDistillTrainer}
    plain = trained(tmp_path / "a", **options)
    options["teacher_cache"] = str(tmp_path / "cache")
    cached = make_trainer(tmp_path / "b", **options)
    assert cached.lens_objective.teacher is None
    cached.train()
    assert len(logged(plain)) == 8 // accumulate
    for key in ("loss", "kd", "lens_1"):
        assert logged(cached, key) == pytest.approx(logged(plain, key), rel=1e-5), key
    assert cached.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    third = trained(tmp_path / "c", **options)
    assert logged(third) == logged(cached)


def test_cache_serves_only_the_trainers_own_data(tmp_path):
    trainer = make_trainer(tmp_path, teacher_cache=str(tmp_path / "cache"))
    other = [{**x, "example_id": i} for i, x in enumerate(uneven_data()[:3])]
    for function in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="pass the data as eval_dataset when you create"):
            function(other)
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] > 0
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] > 0
    with pytest.raises(TypeError, match="train_dataset of known length.* got a generator"):
        make_trainer(tmp_path, teacher_cache=str(tmp_path / "o"), data=(x for x in uneven_data()))


def test_a_cache_of_another_run_is_refused(tmp_path):
    cache = {"teacher_cache": str(tmp_path / "cache")}
    make_trainer(tmp_path, **cache)
    for options, message in (
        ({"num_lens_pairs": 1}, "layers"),
        ({"data": [*reversed(uneven_data())]}, "data"),
        ({"bf16": True}, "another mixed precision: found no, expected bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **cache, **options)


def test_a_cache_of_mixed_precision_gives_the_same_training(tmp_path):
    cached = trained(tmp_path, max_steps=1, bf16=True, teacher_cache=str(tmp_path / "cache"))
    plain = trained(tmp_path, max_steps=1, bf16=True)
    assert logged(cached) == pytest.approx(logged(plain), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_teacher_cache_dtype_sets_the_storage_dtype(tmp_path, dtype):
    folder = tmp_path / "cache"
    options = {"teacher_cache": str(folder), "teacher_cache_dtype": dtype, "max_steps": 1}
    cached, plain = trained(tmp_path, **options), trained(tmp_path, max_steps=1)
    (shard,) = folder.glob("train/*.safetensors")
    with safe_open(shard, "pt") as file:
        assert str(file.get_tensor("final").dtype) == f"torch.{dtype}"
    # transformers 4 rounds the loss to four decimals, but not its parts.
    error = abs(logged(cached, "kd")[0] / logged(plain, "kd")[0] - 1)
    assert error < 1e-5 if dtype == "float32" else 1e-7 < error < 2e-2
