"""The program that counts ZeRO-3's collectives for test_deepspeed.py, on each rank.

The command is ``python -m torch.distributed.run ... -m tests.support.deepspeed_traffic FILE``. Rank
0 writes FILE: for each of three steps, the bytes of the whole tensors by kind of collective.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist

from lens_kernels.hf.training.objective import LensObjective
from lens_kernels.hf.training.whole_heads import partition
from tests.support import tiny
from tests.support.deepspeed_run import config_of, use_gloo
from tests.support.sharded_models import STUDENT, TEACHER, batch, tokens

COUNTED = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}


def count(sent: Counter[str]) -> None:
    """Make DeepSpeed add the bytes of each collective to ``sent``."""
    backend = sys.modules["deepspeed.comm.torch"].TorchBackend

    def counting(kind: str, call: Any) -> Any:
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            sent[kind] += max(x.nbytes for x in tensors)
            return call(self, *args, **kwargs)

        return counted

    for name, kind in COUNTED.items():
        setattr(backend, name, counting(kind, getattr(backend, name)))


def main() -> None:
    torch.set_num_threads(1)
    use_gloo()
    import deepspeed

    sent: Counter[str] = Counter()
    count(sent)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    student, teacher = tiny.model(**STUDENT), tiny.model(**TEACHER)
    objective = LensObjective(student, teacher, [1, 2], [1, 3], kd_ratio=0.5)
    config: dict[str, Any] = {
        **config_of(3),
        "train_micro_batch_size_per_gpu": 8 // world,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 8,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    # With these settings, DeepSpeed releases the student's weights after each use.
    config["zero_optimization"] |= {
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
    }
    engine, *_ = deepspeed.initialize(model=student, config=config)
    partition(teacher)
    seen = []
    for _ in range(3):
        sent.clear()
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
        engine.backward(objective(batch(rows), tokens(), student_call=engine).loss)
        engine.step()
        seen.append(dict(sent))
    if rank == 0:
        sizes = [sum(x.ds_numel for x in model.parameters()) for model in (student, teacher)]
        Path(sys.argv[1]).write_text(json.dumps({"seen": seen, "parameters": sizes}))


if __name__ == "__main__":
    main()
