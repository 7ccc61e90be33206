"""The program that trains with DeepSpeed in test_deepspeed.py, on each rank.

The command is ``python -m torch.distributed.run ... -m tests.support.deepspeed_run FOLDER CASE``.
CASE is JSON: ``stage`` and ``rows`` of ZeRO, and whether embeddings are ``tied``. The student is
saved in FOLDER, after two steps with a restart between them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import accelerate
import pytest
import torch

from lens_kernels.hf import LensDistillConfig
from lens_kernels.hf.training.checks import check_weights
from tests.support import tiny
from tests.support.training import RUN, STUDENT, TEACHER, InOrder, uneven_data


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


def refuse_a_weight_that_is_nan(model: Any) -> None:
    """Make the last entry of a partitioned weight NaN, check that it is found, and restore it."""
    import deepspeed

    name, weight = next((name, x) for name, x in model.named_parameters() if "down_proj" in name)

    def replace(value: float) -> float:
        with torch.no_grad(), deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            last, weight[-1, -1] = float(weight[-1, -1]), value
        return last

    last = replace(float("nan"))
    with pytest.raises(ValueError, match=f"1 trained weights are not finite, such as {name}"):
        check_weights(dict(model.named_parameters()), [name])
    replace(last)
    check_weights(dict(model.named_parameters()), [name])


def main() -> None:
    torch.set_num_threads(1)
    folder, case = Path(sys.argv[1]), json.loads(sys.argv[2])
    use_gloo()

    # Create the models before the first config. Models that are created later have no weights.
    tied = case["tied"]
    pairs = [(tiny.model(**STUDENT, tie_word_embeddings=tied), tiny.model(**TEACHER)) for _ in "12"]

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
        refuse_a_weight_that_is_nan(trainer.model)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "student"))
    (folder / f"loss-{trainer.args.process_index}").write_text(str(loss))


if __name__ == "__main__":
    main()
