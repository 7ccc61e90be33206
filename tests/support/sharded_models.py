"""Steps of the whole objective on models that are spread over the ranks of a test."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lens_kernels import distillation_loss
from lens_kernels.hf.model.anatomy import blocks_of, lens_head_from
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.training.objective import LensObjective
from tests.support import tiny
from tests.support.processes import counted
from tests.support.training import batch_of, uneven_data

STUDENT = {"layers": 3, "seed": 1}
TEACHER = {"layers": 4, "width": 24, "seed": 2}
LAYERS = [1, 2], [1, 3]


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
    """Compute the gradients of a batch on models that are spread over all ranks.

    Return the relative errors of gradients and loss, the collectives, and the number of the
    student's and the teacher's parameters.
    """
    student = tiny.model(**STUDENT, tie_word_embeddings=tied)
    models = student, tiny.model(**TEACHER)
    # With ``process_group``, labels would add reductions that the plan does not count.
    options: dict[str, Any] = {"kd_ratio": 1.0 if kind == "vocabulary" else 0.5}
    whole = LensObjective(*copy.deepcopy(models), *LAYERS, **options)
    truth = whole(batch(slice(None)))
    truth.loss.backward()
    if kind == "vocabulary":
        total, seen = step_of_vocabulary(models)
    else:
        total, seen = step_of_rows(models, kind, mixed, whole_root, options)
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
        "seen": seen,
        "parameters": [sum(x.numel() for x in model.parameters()) for model in models],
    }


def step_of_rows(
    models: Any, kind: str, mixed: bool, whole_root: bool, options: dict[str, Any]
) -> tuple[Tensor, list[Any]]:
    """Compute the gradients of a batch whose rows are divided between the ranks.

    Return the loss of all ranks, and the collectives.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    student, teacher = models
    objective = LensObjective(*models, *LAYERS, **options)
    teacher.lm_head.register_forward_hook(refuse)
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
    return total, [*seen]


def refuse(*_: Any) -> None:
    raise AssertionError("the head of the teacher ran")


def step_of_vocabulary(models: Any) -> tuple[Tensor, list[Any]]:
    """Compute the gradients of a batch that all ranks have, with heads sharded by vocabulary.

    FSDP2 shards all other weights. Return the loss and the collectives.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    heads = [lens_head_from(model) for model in models]
    for model in models:
        for block in blocks_of(model):
            fully_shard(block)
        fully_shard(model.model)  # the decoder, without the head
        weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
        model.lm_head.weight = nn.Parameter(weight)
    inputs = batch(slice(None))
    labels = inputs.pop("labels")
    counted_rows = (labels[:, 1:] != -100).flatten()

    def rows_of(model: Any, layers: list[int]) -> list[Tensor]:
        hidden, final = hidden_states(model, layers, inputs)
        return [x[:, :-1].flatten(0, 1)[counted_rows] for x in [*hidden, final]]

    with counted() as seen:
        with torch.no_grad():
            teacher_rows = rows_of(models[1], LAYERS[1])
        student_rows = rows_of(models[0], LAYERS[0])
        # The norm belongs to FSDP's root, whose parameters stay gathered until the backward pass.
        heads = [
            replace(
                head,
                weight=model.lm_head.weight,
                norm=replace(head.norm, weight=model.model.norm.weight),
            )
            for model, head in zip(models, heads, strict=True)
        ]
        output = distillation_loss(
            student_rows[:-1],
            teacher_rows[:-1],
            *heads,
            student_final=student_rows[-1],
            teacher_final=teacher_rows[-1],
            process_group=mesh.get_group(),
        )
        output.loss.backward()
    return output.loss.detach(), [*seen]


def run(case: dict[str, Any]) -> dict[str, Any]:
    return step(**case)
