"""The program that counts ZeRO-3's collectives for test_deepspeed.py, on each rank.

The command is ``python -m torch.distributed.run ... -m tests.support.deepspeed_traffic FILE``. Rank
0 writes FILE: the bytes of the whole tensors in each kind of collective of a step.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend

from lens_kernels.hf.training.objective import LensObjective
from lens_kernels.hf.training.whole_heads import partition
from tests.support import tiny
from tests.support.deepspeed_run import config_of, use_gloo
from tests.support.sharded_models import STUDENT, TEACHER, batch, tokens

COUNTED = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}


def main() -> None:
    torch.set_num_threads(1)
    use_gloo()
    sent: Counter[str] = Counter()

    def counting(kind: str, call: Any) -> Any:
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            sent[kind] += max(x.numel() * x.element_size() for x in tensors)
            if kind == "all_gather" and dist.get_rank() == 0: print("GATHER", max(x.numel() for x in tensors), flush=True)
            return call(self, *args, **kwargs)

        return counted

    for name, kind in COUNTED.items():
        setattr(TorchBackend, name, counting(kind, getattr(TorchBackend, name)))
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    student, teacher = tiny.model(**STUDENT), tiny.model(**TEACHER)
    config = config_of(3) | {"train_micro_batch_size_per_gpu": 8 // world, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    config["gradient_accumulation_steps"] = 1; del config["train_batch_size"]
    if len(sys.argv) > 2: config["zero_optimization"] |= json.loads(sys.argv[2])
    objective = LensObjective(student, teacher, [1, 2], [1, 3], kd_ratio=0.5)
    engine, *_ = deepspeed.initialize(model=student, config=config)
    partition(teacher)
    seen = []
    for _ in range(3):
        sent.clear()
        if rank==0: print("STEP", flush=True)
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
        outcome = objective(batch(rows), tokens(), student_call=engine)
        if rank==0: print("BACK", flush=True)
        engine.backward(world * outcome.loss)
        if rank==0: print("OPT", flush=True)
        engine.step()
        seen.append(dict(sent))
    if rank == 0:
        sizes = [sum(x.ds_numel for x in model.parameters()) for model in (student, teacher)]
        for n,x in student.named_parameters(): print(n,x.ds_numel)
        Path(sys.argv[1]).write_text(json.dumps({"sent": seen, "parameters": sizes}))


if __name__ == "__main__":
    main()
