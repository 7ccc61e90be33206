"""Steps of the whole objective on models that FSDP2 or DDP spreads over the ranks of a test."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lens_kernels.hf.model.anatomy import blocks_of
from lens_kernels.hf.training.objective import LensObjective
from tests.support import tiny
from tests.support.processes import counted
from tests.support.training import batch_of, uneven_data

STUDENT = {"layers": 3, "seed": 1}
TEACHER = {"layers": 4, "width": 24, "seed": 2}


def batch(rows: slice) -> dict[str, Tensor]:
    """Return some of eight examples. Their numbers of labels differ."""
    ids, labels = batch_of(uneven_data())
    return {"input_ids": ids[rows], "labels": labels[rows]}


def tokens() -> int:
    """Return the number of labels in all examples together, without ignored labels."""
    return int((batch(slice(None))["labels"][:, 1:] != -100).sum())


def spread(model: Any, precision: MixedPrecisionPolicy, whole_root: bool) -> None:
    """Shard each block of a model, and then all other parameters together."""
    for block in blocks_of(model):
        fully_shard(block, mp_policy=precision)
    fully_shard(model, mp_policy=precision, reshard_after_forward=None if whole_root else True)


def step(
    tied: bool = False, mixed: bool = False, whole_root: bool = True, kind: str = "fsdp2"
) -> dict[str, Any]:
    """Compute the gradients of a batch whose rows are spread over all ranks.

    Return the relative errors of gradients and loss, the collectives, and the number of the
    student's and the teacher's parameters.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    student = tiny.model(**STUDENT, tie_word_embeddings=tied)
    teacher = tiny.model(**TEACHER)
    models = student, teacher
    options: dict[str, Any] = {"kd_ratio": 0.5}
    whole = LensObjective(copy.deepcopy(student), copy.deepcopy(teacher), [1, 2], [1, 3], **options)
    truth = whole(batch(slice(None)))
    truth.loss.backward()
    objective = LensObjective(student, teacher, [1, 2], [1, 3], **options)
    called: Any = student
    if kind == "fsdp2":
        dtype = torch.bfloat16 if mixed else None
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for model in models:
            spread(model, precision, whole_root)
    else:
        called = DistributedDataParallel(student)
        called.register_comm_hook(None, default_hooks.allreduce_hook)  # seen by counted()
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    with counted() as seen:
        outcome = objective(batch(rows), tokens(), student_call=called)
        (world * outcome.loss).backward()
    total = outcome.loss.detach().clone()
    dist.all_reduce(total)
    errors = {}
    for (name, own), other in zip(
        student.named_parameters(), whole.student.parameters(), strict=True
    ):
        assert own.grad is not None and other.grad is not None
        grad = own.grad.full_tensor() if isinstance(own.grad, DTensor) else own.grad
        errors[name] = float((grad - other.grad).abs().max() / other.grad.abs().max())
    return {
        "errors": errors,
        "loss": float((total - truth.loss.detach()).abs() / truth.loss.detach()),
        "seen": [*seen],
        "parameters": [sum(x.numel() for x in model.parameters()) for model in models],
    }


def run(case: dict[str, Any]) -> dict[str, Any]:
    return step(**case)
