"""The program that trains with DeepSpeed in test_deepspeed.py, on each rank.

The command is ``python -m torch.distributed.run ... -m tests.support.deepspeed_run FOLDER CASE``.
CASE is JSON: ``stage`` and ``rows`` of ZeRO, whether embeddings are ``tied``, and whether the
student has a ``lora`` adapter. The student is saved in FOLDER, after two steps with a restart
between them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import accelerate
import pytest
import torch

from lens_kernels.hf import LensDistillConfig
from lens_kernels.hf.training.checks import check_weights
from tests.support import tiny
from tests.support.training import RUN, STUDENT, TEACHER, InOrder, uneven_data, with_lora


def use_gloo() -> None:
    """Let accelerate start gloo processes for DeepSpeed, which it does only for accelerators."""
    import deepspeed  # noqa: F401

    kind = accelerate.DistributedType.MULTI_CPU
    accelerate.PartialState._prepare_backend = lambda self, *_: ("gloo", kind)
    # Without build_shm_op, DeepSpeed would compile a communication library for CPUs.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def config_of(stage: int) -> dict[str, Any]:
    """Return a DeepSpeed config in which even the smallest parameters are partitioned."""
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    return {
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(auto, "auto"),
    }


def student_of(tied: bool, lora: bool) -> Any:
    student = tiny.model(**STUDENT, tie_word_embeddings=tied)
    return with_lora(student) if lora else student


@contextmanager
def a_weight_that_is_nan(model: Any) -> Iterator[str]:
    """Return a context in which the last entry of a trained weight is NaN. It yields its name."""
    import deepspeed

    name, weight = [(name, x) for name, x in model.named_parameters() if x.requires_grad][-1]

    def replace(value: float) -> float:
        with torch.no_grad(), deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            entries = weight.view(-1)
            last, entries[-1] = float(entries[-1]), value
        return last

    last = replace(float("nan"))
    yield name
    replace(last)


def check_that_nan_is_refused(trainer: Any, folder: Path, stage: int) -> None:
    with a_weight_that_is_nan(trainer.model) as name:
        error = f"1 trained weights are not finite, such as {name}"
        with pytest.raises(ValueError, match=error):
            check_weights(dict(trainer.model.named_parameters()), [name])
        # With ZeRO-3, only rank 0 has the state dict that is written.
        holds = stage < 3 or trainer.args.process_index == 0
        with pytest.raises(RuntimeError, match=error) if holds else nullcontext():
            trainer.save_model(str(folder))
    check_weights(dict(trainer.model.named_parameters()), [name])


def main() -> None:
    torch.set_num_threads(1)
    folder, case = Path(sys.argv[1]), json.loads(sys.argv[2])
    use_gloo()

    # Create the models before the first config. Models that are created later have no weights.
    pairs = [(student_of(case["tied"], case["lora"]), tiny.model(**TEACHER)) for _ in "12"]

    def make() -> Any:
        student, teacher = pairs.pop()
        config = LensDistillConfig(
            output_dir=str(folder),
            per_device_train_batch_size=case["rows"] // int(os.environ["WORLD_SIZE"]),
            deepspeed=config_of(case["stage"]),
            **RUN | {"save_strategy": "steps", "save_steps": 1, "kd_ratio": 0.5},
        )
        data = uneven_data()
        return InOrder(student, teacher, config, train_dataset=data, eval_dataset=data[:3])

    make().train()
    trainer = make()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    if case["stage"] == 3:
        models = trainer.model, trainer.lens_objective.teacher
        assert all(x.numel() == 0 for model in models for x in model.parameters())
    check_that_nan_is_refused(trainer, folder / "broken", case["stage"])
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "student"))
    (folder / f"loss-{trainer.args.process_index}").write_text(str(loss))


if __name__ == "__main__":
    main()
