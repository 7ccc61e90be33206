"""The registry of backends, and the choice of a backend for each call."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lens_kernels import compat, cost, traffic
from lens_kernels.backends.torch import clusters
from lens_kernels.call import LossCall, LossResult
from lens_kernels.inputs import FLOATS
from lens_kernels.options import (
    Divergence,
    LossOptions,
    check_count,
    check_option,
    workspace_or_default,
)


@dataclass(frozen=True)
class Backend:
    """A backend. Its ``module`` defines ``evaluate(call: LossCall) -> LossResult``.

    ``unsupported_reason(device, fp64)`` returns why the backend cannot run on the device, or None.
    ``auto_excluded_reason(device, operand)`` returns why ``"auto"`` skips the backend, or None.
    ``operand`` is the dtype of the GEMMs' operands, or None for any dtype. ``cost`` returns the
    plan of a call; ``"auto"`` takes the cheapest plan. ``takes_shards`` says whether the backend
    supports ``process_group``.
    """

    name: str
    module: str
    cost: Callable[[cost.CallShape], cost.Plan]
    unsupported_reason: Callable[[torch.device, bool], str | None] = lambda *args: None
    auto_excluded_reason: Callable[[torch.device, torch.dtype | None], str | None] = lambda *args: (
        None
    )
    takes_shards: bool = False

    def evaluate(self, call: LossCall) -> LossResult:
        """Return the losses of a call's rows, and the gradients of its loss."""
        return importlib.import_module(self.module).evaluate(call)


@compat.constant_in_graphs
def _triton_unsupported(device: torch.device, fp64: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if fp64:
        return "its kernels compute in float32, but the head is float64"
    if device.type == "cuda":
        return None
    if device.type == "cpu":
        from lens_kernels.backends.triton.interpreter import INTERPRETING

        if INTERPRETING:
            return None
        return (
            "Triton compiles for GPUs only. To run its kernels in Triton's interpreter, which is"
            " for tests and slow, set TRITON_INTERPRET=1 before Python starts"
        )
    return "its kernels are for NVIDIA and AMD GPUs"


@compat.constant_in_graphs
def _triton_auto_excluded(device: torch.device, operand: torch.dtype | None) -> str | None:
    by_name = "only if requested by name"
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return by_name
    try:
        from lens_kernels.backends.triton.tiles import store

        # "auto" uses the kernels only on GPU models on which tuning has checked their results.
        complete = store.is_tuned(operand, device)
    except (ImportError, OSError, RuntimeError) as error:
        # The cause is a missing home folder, or a Triton that cannot be imported.
        return f"{by_name}: {error}"
    return None if complete else f"{by_name}, or once `lens-kernels tune` has run here"


REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "torch", "lens_kernels.backends.torch.row_chunks", cost.row_chunks, takes_shards=True
        ),
        Backend(
            "triton",
            "lens_kernels.backends.triton",
            cost.vocabulary_sweeps,
            _triton_unsupported,
            _triton_auto_excluded,
        ),
    )
}


def automatic(
    device: torch.device, fp64: bool = False, operand: torch.dtype | None = None
) -> list[Backend]:
    """Return the backends that ``"auto"`` may choose."""
    return [
        backend
        for backend in REGISTRY.values()
        if backend.auto_excluded_reason(device, operand) is None
        and backend.unsupported_reason(device, fp64) is None
    ]


def choose(name: str, shape: cost.CallShape) -> Backend:
    """Return the backend called ``name``, or for ``"auto"`` the cheapest backend that can run."""
    device, fp64 = shape.device, shape.compute_dtype is torch.float64
    if name == "auto":
        able = automatic(device, fp64, shape.dtype)
        if shape.sharded:
            able = [backend for backend in able if backend.takes_shards]
        if len(able) == 1:
            return able[0]
        costs = [backend.cost(shape).cost for backend in able]
        return able[costs.index(min(costs))]
    if name not in REGISTRY:
        known = ", ".join(repr(n) for n in ("auto", *REGISTRY))
        raise ValueError(f"backend={name!r} is unknown; choose one of {known}")
    backend = REGISTRY[name]
    reason = backend.unsupported_reason(device, fp64)
    if shape.sharded and not backend.takes_shards:
        reason = "it has no reductions over a process_group"
    if reason is not None:
        raise RuntimeError(
            f"backend={name!r} does not support these tensors on {device.type}: {reason};"
            " or use backend='torch'"
        )
    return backend


def with_backend(call: LossCall, name: str) -> LossCall:
    """Return the call with the backend that ``choose`` returns for ``name``.

    The cost of a deferred call contains its backward pass.
    """
    shape = cost.CallShape.of(replace(call, deferred=False))
    return replace(call, backend=choose(name, shape).name)


def plan(
    tokens: int,
    vocab_size: int,
    student_width: int,
    teacher_width: int,
    *,
    pairs: int = 1,
    divergence: str = LossOptions.divergence,
    dtype: torch.dtype = torch.bfloat16,
    head_grad: bool = True,
    hidden_grad: bool = True,
    workspace_bytes: int | None = LossOptions.workspace_bytes,
    device: str = "cuda",
    one_read: bool | None = None,
    world: int | None = None,
    student_parameters: int | None = None,
    teacher_parameters: int | None = None,
) -> dict[str, cost.Plan]:
    """Estimate the cost of loss and gradients on each backend.

    The entry ``"dense"`` is the cost of computing all logits at once.

    Args:
        tokens: Number of unmasked tokens.
        vocab_size: Size of the shared vocabulary.
        student_width: The student's hidden size.
        teacher_width: The teacher's hidden size.
        pairs: Number of lens pairs. The final hidden states count as one pair.
        divergence: Name of the divergence. KL divergences need one sweep less in ``triton``.
        dtype: Dtype of hidden states and heads.
        head_grad: Whether the student's head needs a gradient.
        hidden_grad: Whether the student's hidden states or norm need a gradient.
        workspace_bytes: As for ``symmetric_lens_loss``.
        device: The type of device.
        one_read: Whether the row kernel on a GPU reads each logit once. It needs a Hopper or
            Blackwell GPU and Triton 3.9. The default is True if it does on this machine.
        world: Number of ranks. The result then also has a ``SharedPlan`` for ``"ddp"``,
            ``"fsdp2"``, ``"zero3"`` and ``"vocabulary"``: the bytes that a rank sends and holds in
            a step over ``tokens`` tokens of its own. With ``"vocabulary"``, all ranks share these
            tokens and split the vocabulary, and the rest of the models is sharded by FSDP2.
        student_parameters: Number of the student's parameters, by default those of its head.
        teacher_parameters: Number of the teacher's parameters, by default those of its head.

    Returns:
        A plan for each name of a backend, and for ``"dense"``.

    Raises:
        TypeError, ValueError: A size is not a positive integer, the divergence is unknown, the
            dtype is not supported, or ``one_read`` is True and the vocabulary is too large for it.
    """
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    sizes = {"tokens": tokens, "vocab_size": vocab_size, "pairs": pairs}
    sizes |= {"student_width": student_width, "teacher_width": teacher_width}
    for name, value in sizes.items():
        check_count(name, value)
    check_option("divergence", divergence)
    check_option("workspace_bytes", workspace_bytes)
    where = torch.device(device)
    if one_read is None:
        one_read = clusters.for_rows(where, vocab_size) is not None
    elif one_read and clusters.that_holds(vocab_size) is None:
        raise ValueError(
            f"one_read must be False or None for a vocab_size of {vocab_size}: a cluster of"
            f" programs holds at most {clusters.MOST} logits"
        )
    shape = cost.CallShape(
        tokens=tokens,
        vocab_size=vocab_size,
        student_width=student_width,
        teacher_width=teacher_width,
        divergences=(Divergence(divergence),) * pairs,
        dtype=dtype,
        compute_dtype=torch.float64 if dtype is torch.float64 else torch.float32,
        head_grad=head_grad,
        hidden_grad=hidden_grad,
        device=where,
        workspace_bytes=workspace_or_default(workspace_bytes, where),
        one_read=one_read,
    )
    plans = {"dense": cost.dense(shape)}
    plans |= {name: backend.cost(shape) for name, backend in REGISTRY.items()}
    if world is not None:
        check_count("world", world)
        given = {"student_parameters": student_parameters, "teacher_parameters": teacher_parameters}
        for name, number in given.items():
            if number is not None:
                check_count(name, number)
        plans |= traffic.shared_plans(shape, world, student_parameters, teacher_parameters)
    return plans
