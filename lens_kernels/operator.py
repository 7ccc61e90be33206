"""The loss as one differentiable torch operator, which runs any backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lens_kernels import compat, dispatch
from lens_kernels.backends import compiled
from lens_kernels.call import SCHEMA, LossCall, Packed


def apply(call: LossCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(loss, rows, dropped)`` of a call.

    ``loss`` is differentiable, and its gradients are computed in the forward pass. If the call is
    ``deferred``, ``rows`` is differentiable instead. Then the backward pass, which knows the weight
    of each row, computes the gradients.
    """
    if not torch.compiler.is_compiling():
        compiled.load()
    loss, rows, dropped, _ = lens_loss(*call.pack())
    return loss, rows, dropped


@torch.library.custom_op(
    "lens_kernels::lens_loss",
    mutates_args=(),
    schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def lens_loss(*packed: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return ``(loss, rows, dropped, gradients of loss)`` of the call in ``packed``.

    ``LossResult`` explains these values.
    """
    call = Packed(*packed).unpack()
    # The backend chooses the dtype of each GEMM, so disable autocast.
    with torch.autocast(call.row_weight.device.type, enabled=False):
        try:
            result = dispatch.REGISTRY[call.backend].evaluate(call)
        except RuntimeError as error:
            cuda = isinstance(error, torch.OutOfMemoryError)
            if not cuda and "can't allocate memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(_out_of_memory(call, error)) from error
    loss = (call.row_weight * result.rows).sum()
    return loss, result.rows, result.dropped, [result.grads[key] for key in call.needing_grad()]


def _out_of_memory(call: LossCall, error: RuntimeError) -> str:
    gradients = sum(x.numel() for x in call.needing_grad().values()) * call.compute_dtype.itemsize
    tiles, others = (f"{size / 2**20:.0f} MiB" for size in (call.workspace_bytes, gradients))
    return (
        f"{error}\nThe loss ran out of memory. Its tiles of logits may take"
        f" workspace_bytes={call.workspace_bytes} ({tiles}): pass a smaller workspace_bytes. Its"
        f" gradients of hidden states and head take {others} besides"
    )


@lens_loss.register_fake
def _(*packed: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    call = Packed(*packed).unpack()
    rows = torch.empty_like(call.row_weight, dtype=call.compute_dtype)
    grads = [
        call.row_weight.new_empty(x.shape, dtype=call.compute_dtype)
        for x in call.needing_grad().values()
    ]
    scalar = rows.new_empty(())
    return scalar, rows, torch.empty_like(scalar), grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    loss, rows, dropped, grads = output
    packed = Packed(*inputs)
    call = packed.unpack()
    ctx.deferred = call.deferred
    # Autograd saves the call's tensors, and frees them after the backward pass.
    without: Any = {"student": [], "row_weight": None, "constants": [None] * len(packed.constants)}
    ctx.packed = packed._replace(**without)
    ctx.set_materialize_grads(False)
    if call.deferred:
        ctx.mark_non_differentiable(loss, dropped, *grads)
        saved = [_savable(x) for x in (*packed.student, *packed.constants)]
    else:
        ctx.mark_non_differentiable(rows, dropped, *grads)
        saved = [rows, call.row_weight, *grads, *call.needing_grad().values()]
    ctx.save_for_backward(*saved)


def _savable(x: Tensor) -> Tensor:
    """Return ``x``, or a copy if ``x`` is an inference tensor, which autograd cannot save."""
    return x.clone() if x.is_inference() else x


def _backward(ctx: Any, grad_loss: Any, grad_rows: Any, *unused: Any) -> tuple[Any, ...]:
    packed: Packed = ctx.packed
    size = len(packed.needs_grad)
    # The gradients of the operator's arguments, in their order.
    result: dict[str, Any] = dict.fromkeys(Packed._fields)
    result |= {"student": [None] * size, "constants": packed.constants}
    upstream = grad_rows if ctx.deferred else grad_loss
    if upstream is None:
        return tuple(result.values())
    if ctx.deferred:
        student, constants = [*ctx.saved_tensors[:size]], [*ctx.saved_tensors[size:]]
        call = packed._replace(student=student, constants=constants).unpack()
        call = replace(call, row_weight=upstream, deferred=False)
        with torch.no_grad():
            *_, grads = lens_loss(*call.pack())
        like = [*call.needing_grad().values()]
        upstream = upstream.new_ones(())
    else:
        rows, row_weight, *tensors = ctx.saved_tensors
        grads, like = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        if row_weight.requires_grad:
            (result["row_weight"],) = scale_gradients([rows], grad_loss, [row_weight])
    if compat.backward_keeps_graph() or torch.is_grad_enabled():
        scaled = scale_gradients(grads, upstream, like)
    else:
        # No later backward pass needs the gradients, so scale them in place, which saves a copy of
        # the head gradient.
        scaled = [g.mul_(upstream).to(x.dtype) for g, x in zip(grads, like, strict=True)]
    each = iter(scaled)
    result["student"] = [next(each) if needed else None for needed in packed.needs_grad]
    return tuple(result.values())


lens_loss.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "lens_kernels::scale_gradients",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor upstream, Tensor[] like) -> Tensor[]",
)
def scale_gradients(grads: list[Tensor], upstream: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return ``upstream * grads`` in the dtypes of ``like``.

    The result is a copy, because there may be another backward pass. ``like`` are the tensors to
    which the gradients belong. With this argument, second derivatives reach this operator, which
    then raises an error.
    """
    return [(g * upstream).to(x.dtype) for g, x in zip(grads, like, strict=True)]


@scale_gradients.register_fake
def _(grads: list[Tensor], upstream: Tensor, like: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(g, dtype=x.dtype) for g, x in zip(grads, like, strict=True)]


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "lens_kernels computes first derivatives only: its loss cannot be differentiated twice."
        " For second derivatives of small problems, compute the loss from full logits in torch"
    )


scale_gradients.register_autograd(_refuse)
