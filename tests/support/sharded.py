"""Calls with ``process_group`` that every rank of a test makes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lens_kernels import LensHead, adaptive, compat, dispatch, sharding, symmetric_lens_loss
from lens_kernels.backends import head_products
from lens_kernels.backends.torch import row_chunks
from lens_kernels.backends.torch.layout import row_stride
from lens_kernels.sharding import Reduction
from tests.support.grids import Shape
from tests.support.objectives import make_objective, some_labels, some_targets
from tests.support.operators import Watch
from tests.support.problems import (
    Problem,
    capture_call,
    make,
    objective,
    random_head,
    teacher_statistics,
)
from tests.support.processes import counted
from tests.support.row_kernel_backend import ROW_KERNEL

dispatch.REGISTRY[ROW_KERNEL.name] = ROW_KERNEL  # also on ranks, which run no conftest.py
WIDTH = 61  # a prime number of entries, which no number of ranks divides
HEAD = ("bias", "norm", "norm_bias", "offset", "softcap", "scale")
SIDES = ("student", "teacher")
SHAPE = Shape((5, 7), WIDTH, 12, 10, 2)
SHORT: dict[str, Any] = {"dtype": torch.float32, "norm": "rms"}
SEQUENCE: dict[str, Any] = {"whole": True, "labelled": True, "kd_ratio": 0.5, "bias": True}
SEQUENCE |= {"norm": "rms"}
_groups: dict[int, Any] = {}


def group_of(size: int) -> Any:
    """Return the group of the first ranks, or None on other ranks. Every rank must call this
    function."""
    if size not in _groups:
        _groups[size] = dist.new_group(range(size))
    return _groups[size] if dist.get_rank() < size else None


def slice_of(vocab: int, rank: int, size: int) -> slice:
    """Return a rank's vocabulary entries, divided as torch divides a DTensor."""
    width = -(-vocab // size)
    return slice(min(vocab, rank * width), min(vocab, (rank + 1) * width))


def part_of_rank(problem: Problem, size: int) -> Problem:
    """Return the problem with this rank's slices of both heads."""
    part = slice_of(len(problem.student_head.weight), dist.get_rank(), size)
    heads = {f"{side}_head": getattr(problem, f"{side}_head") for side in SIDES}
    return replace(problem, **{k: x if x is None else cuts(x, part) for k, x in heads.items()})


def cuts(head: Any, part: slice) -> Any:
    """Return a slice of a head, or of each of several heads."""
    return [cut(each, part) for each in head] if isinstance(head, list) else cut(head, part)


def cut(head: LensHead, part: slice) -> LensHead:
    """Return a copy of a slice of a head."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.requires_grad)

    bias = None if head.bias is None else leaf(head.bias[part])
    return replace(head, weight=leaf(head.weight[part]), bias=bias)


def problem_of(case: dict[str, Any]) -> tuple[Problem, dict[str, Any]]:
    """Return a case's problem and the options of its call.

    The result depends only on the case, so it is equal on all ranks.
    """
    case = dict(case)
    whole, dtype = case.get("whole", False), case.pop("dtype", torch.float64)
    torch.manual_seed(1)
    head = {name: case.pop(name) for name in HEAD if name in case}
    shape = case.pop("shape", SHAPE)
    problem = (make_objective if whole else make)(shape, 2.0, **head).to(dtype)
    if case.pop("exact_products", False):
        problem = problem.to(torch.bfloat16).to(dtype)
    if case.pop("masked", False):
        case["mask"] = torch.rand(shape.leading) < 0.6
    if case.pop("labelled", False):
        labels = some_labels(shape)
        case["labels"] = labels.where(labels < case.get("vocab_size", shape.vocab), -100)
    if case.pop("teachers", False):
        other = random_head(shape.vocab, shape.teacher, norm="layer", softcap=3.0)
        problem.teacher_head = [other.map(lambda x: x.detach().to(dtype)), problem.teacher_head]
    if "rest" in case:
        # Listed entries are those of all ranks, the first and the last entry among them.
        targets = some_targets(shape, 9, case.pop("rest"), case.get("vocab_size"))
        targets.token_ids[..., 2], targets.token_ids[..., 3] = 0, case.get("vocab_size", WIDTH) - 1
        if whole:
            problem.teacher_hidden[-1] = targets
        else:
            problem.teacher_hidden, problem.teacher_head = targets, None
        case["final_divergence" if whole else "divergence"] = "forward_kl"
    if case.pop("frozen_head", False):
        problem.freeze("hidden0")
    if case.pop("statistics", False):
        case["teacher_statistics"] = teacher_statistics(problem)
    return problem, case


def solve(problem: Problem, options: dict[str, Any], group: Any = None) -> dict[str, Tensor]:
    """Return the results and gradients of a call by name."""
    options = dict(options)
    out: dict[str, Any] = {}
    if options.pop("whole", False):
        result = objective(problem, process_group=group, **options)
        out = {k: v for k, v in result._asdict().items() if v is not None}
        loss = result.loss
    else:
        loss = symmetric_lens_loss(*problem.args(), process_group=group, **options)
        out["loss"] = loss
        if loss.dim():
            loss = (loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)).sum()
    grads = {k: g for k, g in problem.gradients(loss).items() if g is not None}
    return {k: x.detach() for k, x in (out | grads).items()}


def solve_sharded(size: int, case: dict[str, Any]) -> dict[str, Tensor] | None:
    """Return this rank's results, or None on ranks outside the group."""
    group = group_of(size)
    if group is None:
        return None
    problem, options = problem_of(case)
    return solve(part_of_rank(problem, size), options, group)


def count_collectives(size: int, case: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the collectives of a call, with their bytes."""
    group_of(size)
    with counted() as seen:
        solve_sharded(size, case)
    return [*seen]


def largest_tensor(size: int) -> int:
    """Return the size of the largest tensor that a call with a large vocabulary creates."""
    group = group_of(size)
    shape = Shape((40,), 2001, 4, 4, 1)
    room = 7 * row_stride(-(-shape.vocab // size)) * 2 * 4
    problem, options = problem_of({"shape": shape, "dtype": torch.float32, "workspace_bytes": room})
    part = part_of_rank(problem, size)
    call = capture_call(pytest.MonkeyPatch(), part, process_group=group, **options)
    with Watch() as watch, torch.no_grad():
        row_chunks.evaluate(call)
    return watch.largest


def solve_active(size: int, case: dict[str, Any]) -> dict[str, Tensor] | None:
    """Return this rank's results, with inactive entries skipped even if most are active."""
    head_products.MAX_ACTIVE_SHARE = 1.0
    return solve_sharded(size, case)


def solve_dtensors(case: dict[str, Any]) -> dict[str, Tensor]:
    """Return the results of a call with sharded DTensors as heads, gathered from all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    problem, options = problem_of(case)

    def shard(head: LensHead) -> LensHead:
        def leaf(x: Tensor) -> Tensor:
            place = Replicate() if x.shape[0] != len(head.weight) else Shard(0)
            return distribute_tensor(x.detach(), mesh, [place]).requires_grad_(x.requires_grad)

        return head.map(leaf)

    problem.student_head, problem.teacher_head = map(
        shard, (problem.student_head, problem.teacher_head)
    )
    results = solve(problem, options, mesh.get_group())
    assert results["weight"].placements == (Shard(0),)
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in results.items()}


# Teacher probabilities with equal entries where their running sum crosses one half.
TIED = [
    [0.125] * 8 + [0.0],
    [0.05, 0.2, 0.2, 0.1, 0.2, 0.05, 0.0, 0.2, 0.0],
    [0.05, 0.6, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5],
]
OTHER = torch.tensor([0.3, 0.05, 0.02, 0.13, 0.1, 0.15, 0.05, 0.08, 0.12])


def head_share_of(size: int, p: list[float]) -> Tensor | None:
    """Return the adaptive KL's weight of the forward KL for one row, sharded over ranks."""
    group = group_of(size)
    if group is None:
        return None
    part = slice_of(len(p), dist.get_rank(), size)
    rows = torch.tensor([p])[:, part], OTHER[None, part]
    return adaptive.share_of(rows, Reduction(group.group_name))


def refused(name: str) -> str:
    """Return the error of a call whose arguments differ between three ranks."""
    group, rank = group_of(3), dist.get_rank()
    mesh = init_device_mesh("cpu", (4,))
    if group is None:
        return ""
    problem, options = problem_of({"bias": True})
    bounds = [slice_of(WIDTH, rank, 3)] * 2
    if name == "tokens" and rank == 2:
        problem = problem.map(lambda x: x.detach()[:, :6].requires_grad_(x.requires_grad), "hidden")
    if name == "mask":
        options["mask"] = torch.arange(35).view(5, 7) < 10 + rank
    if name == "options":
        options["temperature"] = 1.0 + rank
    if name == "grads" and rank == 1:
        problem.freeze("hidden0")
    if name == "cuts":
        bounds[1] = slice((0, 20, 40)[rank], (20, 40, 61)[rank])
    if name == "empty":
        options["vocab_size"] = 20
    if name == "triton":
        options["backend"] = "triton"
    student, teacher = cut(problem.student_head, bounds[0]), cut(problem.teacher_head, bounds[1])
    if name == "sizes" and rank == 2:
        teacher = teacher.map(lambda x: torch.cat([x, x[:3]]))
    if name == "placement":
        whole = problem.student_head.weight.detach()
        student = LensHead(DTensor.from_local(whole, mesh, [Replicate()], run_check=False))
    heads = problem.student_hidden, problem.teacher_hidden, student, teacher
    if name == "rest":
        rest = "ghost" if rank else "uniform"
        heads = problem.student_hidden, some_targets(SHAPE, rest=rest), student, None
        options["divergence"] = "forward_kl"
    try:
        symmetric_lens_loss(*heads, process_group="x" if name == "no group" else group, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


class Patience:
    """A clock that stands until all ``survivors`` have reported an error.

    With a real clock, the ranks that an error names would depend on the speed of the machine.
    """

    def __init__(self, group: str, survivors: list[int]) -> None:
        self.names = [f"lens_kernels/failed/{group}/{rank}" for rank in survivors]
        self.now, self.sleep = 0.0, time.sleep

    def monotonic(self) -> float:
        self.now += 2 * sharding.WAIT * compat.default_store().check(self.names)
        return self.now


def die_within(size: int, victim: int, moment: int) -> str:
    """Kill a rank during reduction number ``moment`` of a call, and return the error of other
    ranks."""
    group = group_of(size)
    survivors = [rank for rank in range(size) if rank != victim]
    sharding.time = Patience(group.group_name, survivors)
    if dist.get_rank() == victim:
        reduce, seen = dist.all_reduce, []

        def fatal(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            if len(seen) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return reduce(*args, **kwargs)

        dist.all_reduce = fatal
    problem, options = problem_of(SHORT)
    try:
        solve(part_of_rank(problem, size), options, group)
    except RuntimeError as error:
        return str(error)
    return "no error"


def tokens_of_one_sequence() -> dict[str, Tensor]:
    """Return the summed results of ranks that each hold some tokens of every sequence.

    The last rank has no tokens.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    problem, options = problem_of(SEQUENCE)
    length = SHAPE.leading[1]
    width = -(-length // (world - 1))
    own = slice(min(length, rank * width), min(length, (rank + 1) * width))
    part = problem.map(lambda x: x.detach()[:, own].requires_grad_(x.requires_grad), "hidden")
    options["labels"] = options["labels"][:, own]
    # Every rank needs the number of tokens of all ranks.
    count = (options["labels"] != -100).sum()
    dist.all_reduce(count)
    results = solve(part, {**options, "denominator": count})
    for name in ("loss", "weight", "bias", "norm_weight"):
        dist.all_reduce(results[name])
    return results
