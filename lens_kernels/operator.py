"""The one differentiable operator. It runs any backend, and ``torch.compile`` sees one node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lens_kernels import compat, dispatch
from lens_kernels.call import SCHEMA, LossCall, Packed


def apply(call: LossCall, backend: str, deferred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(loss, rows, dropped)`` of a call.

    ``loss`` is differentiable, and its gradients are computed in the forward pass. With
    ``deferred``, ``rows`` is differentiable instead. Its gradients are computed in the backward
    pass, when the weight of each row is known.
    """
    loss, rows, dropped, _ = lens_loss(backend, deferred, *call.pack())
    return loss, rows, dropped


@torch.library.custom_op(
    "lens_kernels::lens_loss",
    mutates_args=(),
    schema=f"(str backend, bool deferred, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def lens_loss(
    backend: str, deferred: bool, *packed: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return ``(loss, rows, dropped, gradients of loss)``. See ``LossCall`` and ``LossResult``."""
    call = Packed(*packed).unpack()
    if deferred:
        call = replace(call, needs_grad=[False] * len(call.needs_grad))
    # The backend decides the dtype of each product. Autocast must not change it.
    with torch.autocast(call.row_weight.device.type, enabled=False):
        result = dispatch.REGISTRY[backend].evaluate(call)
    loss = (call.row_weight * result.rows).sum()
    return loss, result.rows, result.dropped, [result.grads[key] for key in call.needing_grad()]


@lens_loss.register_fake
def _(backend: str, deferred: bool, *packed: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    call = Packed(*packed).unpack()
    rows = torch.empty_like(call.row_weight, dtype=call.compute_dtype)
    grads = [
        call.row_weight.new_empty(x.shape, dtype=call.compute_dtype)
        for x in ([] if deferred else call.needing_grad().values())
    ]
    scalar = rows.new_empty(())
    return scalar, rows, torch.empty_like(scalar), grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    backend, deferred, *arguments = inputs
    loss, rows, dropped, grads = output
    packed = Packed(*arguments)
    ctx.backend, ctx.deferred, ctx.needs_grad = backend, deferred, packed.needs_grad
    ctx.lengths = [len(x) for x in (packed.student_hidden, packed.teacher_hidden, packed.heads)]
    ctx.set_materialize_grads(False)
    if deferred:
        ctx.mark_non_differentiable(loss, dropped, *grads)
        no_tensors: dict[str, Any] = {"mask": None, "labels": None, "row_weight": None}
        ctx.packed = packed._replace(student_hidden=[], teacher_hidden=[], heads=[], **no_tensors)
        tensors = [*packed.student_hidden, *packed.teacher_hidden, *packed.heads]
        saved = [*map(_savable, [packed.mask, packed.labels, *tensors])]
    else:
        ctx.mark_non_differentiable(rows, dropped, *grads)
        saved = [rows, packed.row_weight, *grads, *packed.unpack().needing_grad().values()]
    ctx.save_for_backward(*saved)


def _savable(x: Tensor | None) -> Tensor | None:
    """Return ``x``, or a copy if it is an inference tensor, which autograd cannot save."""
    return x.clone() if x is not None and x.is_inference() else x


def _backward(ctx: Any, grad_loss: Any, grad_rows: Any, *unused: Any) -> tuple[Any, ...]:
    students, teachers, heads = ctx.lengths
    # Gradients of the packed call, in the order of the operator's arguments.
    result: dict[str, Any] = dict.fromkeys(Packed._fields)
    result["student_hidden"], result["teacher_hidden"] = [None] * students, [None] * teachers
    result["heads"] = [None] * heads
    upstream = grad_rows if ctx.deferred else grad_loss
    if upstream is None:
        return None, None, *result.values()
    if ctx.deferred:
        mask, labels, *tensors = ctx.saved_tensors
        packed = ctx.packed._replace(
            student_hidden=tensors[:students],
            teacher_hidden=tensors[students : students + teachers],
            heads=tensors[students + teachers :],
            mask=mask,
            labels=labels,
            row_weight=upstream,
        )
        with torch.no_grad():
            *_, grads = lens_loss(ctx.backend, False, *packed)
        like = [*packed.unpack().needing_grad().values()]
        upstream = upstream.new_ones(())
    else:
        rows, row_weight, *saved = ctx.saved_tensors
        grads, like = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if row_weight.requires_grad:
            (result["row_weight"],) = scale_gradients([rows], grad_loss, [row_weight])
    if compat.backward_keeps_graph() or torch.is_grad_enabled():
        scaled = scale_gradients(grads, upstream, like)
    else:
        # No later pass needs the gradients. Scaling them in place avoids a copy of the head
        # gradient.
        scaled = [g.mul_(upstream).to(x.dtype) for g, x in zip(grads, like, strict=True)]
    each_scaled = iter(scaled)
    each = [next(each_scaled) if needed else None for needed in ctx.needs_grad]
    result["student_hidden"] = each[:students]
    result["heads"][: len(each) - students] = each[students:]  # the student's tensors come first
    return None, None, *result.values()


lens_loss.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "lens_kernels::scale_gradients",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor upstream, Tensor[] like) -> Tensor[]",
)
def scale_gradients(grads: list[Tensor], upstream: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return ``upstream * grads`` in the dtypes of ``like``.

    The result is a copy, because the graph may be differentiated again. The gradients belong to the
    tensors ``like``. Because ``like`` is an argument, second derivatives reach this operator, which
    raises an error.
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
