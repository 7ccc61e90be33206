"""The one differentiable operator behind every backend; to ``torch.compile`` it is one node."""

from typing import Any, List, Optional, Tuple  # noqa: UP035  torch infers the schema from these

import torch
from torch import Tensor

from lens_kernels import compat, dispatch
from lens_kernels.call import LossCall
from lens_kernels.lens import LensHead
from lens_kernels.spec import Divergence, LossSpec


def apply(
    call: LossCall, backend: dispatch.Backend, deferred: bool
) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
    """Return ``(loss, rows, dropped)`` of a call.

    ``loss`` is differentiable, its gradients made together with it. With ``deferred`` it is
    ``rows`` that is differentiable, and the gradients are made in the backward pass, once the
    weight of each row is known.
    """
    if backend.differentiable:
        rows = backend.load().rows(call)
        return (call.row_weight * rows).sum(), rows, rows.new_zeros(())
    loss, rows, dropped, _ = lens_loss(*_pack(call, backend.name, deferred))
    return loss, rows, dropped


def _pack(call: LossCall, backend: str, deferred: bool) -> Tuple[Any, ...]:  # noqa: UP006
    spec = call.spec
    return (
        call.student_hidden,
        call.teacher_hidden,
        list(call.student_head.tensors().values()),
        list(call.teacher_head.tensors().values()),
        ",".join(call.student_head.tensors()),
        ",".join(call.teacher_head.tensors()),
        call.student_head.scalars(),
        call.teacher_head.scalars(),
        call.mask,
        call.labels,
        call.row_weight,
        call.operand_dtype,
        ",".join([d.value for d in spec.divergences]),
        list(spec.normed),
        spec.beta,
        spec.temperature,
        spec.vocab_size,
        spec.workspace_bytes,
        spec.grad_threshold,
        spec.threshold_is_relative,
        call.needs_grad,
        backend,
        deferred,
    )


@torch.library.custom_op("lens_kernels::lens_loss", mutates_args=())
def lens_loss(
    student_hidden: List[Tensor],  # noqa: UP006
    teacher_hidden: List[Tensor],  # noqa: UP006
    student_head: List[Tensor],  # noqa: UP006
    teacher_head: List[Tensor],  # noqa: UP006
    student_names: str,
    teacher_names: str,
    student_scalars: List[float],  # noqa: UP006
    teacher_scalars: List[float],  # noqa: UP006
    mask: Optional[Tensor],  # noqa: UP045
    labels: Optional[Tensor],  # noqa: UP045
    row_weight: Tensor,
    operand_dtype: Optional[torch.dtype],  # noqa: UP045
    divergences: str,
    normed: List[bool],  # noqa: UP006
    beta: float,
    temperature: float,
    vocab_size: int,
    workspace_bytes: int,
    grad_threshold: Optional[float],  # noqa: UP045
    threshold_is_relative: bool,
    needs_grad: List[bool],  # noqa: UP006
    backend: str,
    deferred: bool,
) -> Tuple[Tensor, Tensor, Tensor, List[Tensor]]:  # noqa: UP006
    """Return ``(loss, rows, dropped, gradients of loss)``; see ``LossCall`` and ``Evaluation``."""
    call = LossCall(
        student_hidden=student_hidden,
        teacher_hidden=teacher_hidden,
        student_head=_head(student_names, student_head, student_scalars),
        teacher_head=_head(teacher_names, teacher_head, teacher_scalars),
        mask=mask,
        labels=labels,
        row_weight=row_weight,
        operand_dtype=operand_dtype,
        spec=LossSpec(
            divergences=tuple(Divergence(name) for name in divergences.split(",")),
            normed=tuple(normed),
            beta=beta,
            temperature=temperature,
            vocab_size=vocab_size,
            workspace_bytes=workspace_bytes,
            grad_threshold=grad_threshold,
            threshold_is_relative=threshold_is_relative,
        ),
        needs_grad=[needed and not deferred for needed in needs_grad],
    )
    # The dtype of the products is the call's business: autocast must not meddle inside.
    with torch.autocast(row_weight.device.type, enabled=False):
        result = dispatch.REGISTRY[backend].load().evaluate(call)
    loss = (row_weight * result.rows).sum()
    return loss, result.rows, result.dropped, [result.grads[key] for key in call.wanted()]


def _head(names: str, tensors: List[Tensor], scalars: List[float]) -> LensHead:  # noqa: UP006
    return LensHead.from_parts(dict(zip(names.split(","), tensors, strict=True)), scalars)


@lens_loss.register_fake
def _(
    student_hidden,
    teacher_hidden,
    student_head,
    teacher_head,
    student_names,
    teacher_names,
    student_scalars,
    teacher_scalars,
    mask,
    labels,
    row_weight,
    operand_dtype,
    divergences,
    normed,
    beta,
    temperature,
    vocab_size,
    workspace_bytes,
    grad_threshold,
    threshold_is_relative,
    needs_grad,
    backend,
    deferred,
):
    weights = (student_head[0].dtype, teacher_head[0].dtype)
    compute = torch.float64 if torch.float64 in weights else torch.float32
    rows = torch.empty_like(row_weight, dtype=compute)
    grads = [
        row_weight.new_empty(x.shape, dtype=compute)
        for x, needed in zip([*student_hidden, *student_head], needs_grad, strict=True)
        if needed and not deferred
    ]
    scalar = rows.new_empty(())
    return scalar, rows, torch.empty_like(scalar), grads


# Positions of the arguments that the backward pass handles.
STUDENT_HIDDEN, TEACHER_HIDDEN, STUDENT_HEAD, TEACHER_HEAD = range(4)
TENSOR_LISTS = (STUDENT_HIDDEN, TEACHER_HIDDEN, STUDENT_HEAD, TEACHER_HEAD)
MASK, LABELS, ROW_WEIGHT = 8, 9, 10
NEEDS_GRAD, DEFERRED = 20, 22


def _setup_context(ctx, inputs, output):
    loss, rows, dropped, grads = output
    ctx.inputs = [None if i in (*TENSOR_LISTS, ROW_WEIGHT) else x for i, x in enumerate(inputs)]
    ctx.inputs[MASK] = ctx.inputs[LABELS] = None
    ctx.lengths = [len(inputs[i]) for i in TENSOR_LISTS]
    ctx.set_materialize_grads(False)
    if inputs[DEFERRED]:
        ctx.mark_non_differentiable(loss, dropped, *grads)
        saved = [inputs[MASK], inputs[LABELS], inputs[ROW_WEIGHT]]
        saved += [x for i in TENSOR_LISTS for x in inputs[i]]
    else:
        ctx.mark_non_differentiable(rows, dropped, *grads)
        saved = [rows, inputs[ROW_WEIGHT], *grads, *_wanting(inputs)]
    ctx.save_for_backward(*saved)


def _wanting(inputs):
    tensors = [*inputs[STUDENT_HIDDEN], *inputs[STUDENT_HEAD]]
    return [x for x, needed in zip(tensors, inputs[NEEDS_GRAD], strict=True) if needed]


def _backward(ctx, grad_loss, grad_rows, grad_dropped, grad_grads):
    needed = ctx.inputs[NEEDS_GRAD]
    result: List[Any] = [None] * len(ctx.inputs)  # noqa: UP006
    for i, length in zip(TENSOR_LISTS, ctx.lengths, strict=True):
        result[i] = [None] * length
    upstream = grad_rows if ctx.inputs[DEFERRED] else grad_loss
    if upstream is None:
        return tuple(result)
    if ctx.inputs[DEFERRED]:
        inputs = list(ctx.inputs)
        inputs[MASK], inputs[LABELS], _, *tensors = ctx.saved_tensors
        for i, length in zip(TENSOR_LISTS, ctx.lengths, strict=True):
            inputs[i], tensors = tensors[:length], tensors[length:]
        inputs[ROW_WEIGHT], inputs[DEFERRED] = upstream, False
        wanting = _wanting(inputs)
        with torch.no_grad():
            *_, grads = lens_loss(*inputs)
        upstream = upstream.new_ones(())
    else:
        rows, row_weight, *saved = ctx.saved_tensors
        grads, wanting = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if ctx.needs_input_grad[ROW_WEIGHT]:
            (result[ROW_WEIGHT],) = scale_gradients([rows], grad_loss, [row_weight])
    if compat.backward_keeps_graph() or torch.is_grad_enabled():
        scaled = scale_gradients(grads, upstream, wanting)
    else:
        # Nobody will ask again: in place, or the head gradient would exist twice.
        scaled = [g.mul_(upstream).to(x.dtype) for g, x in zip(grads, wanting, strict=True)]
    each_scaled = iter(scaled)
    each = [next(each_scaled) if n else None for n in needed]
    pairs = ctx.lengths[0]
    result[STUDENT_HIDDEN], result[STUDENT_HEAD] = each[:pairs], each[pairs:]
    return tuple(result)


lens_loss.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("lens_kernels::scale_gradients", mutates_args=())
def scale_gradients(grads: List[Tensor], upstream: Tensor, like: List[Tensor]) -> List[Tensor]:  # noqa: UP006
    """Return ``upstream * grads`` in the dtypes of ``like``.

    Out of place, for graphs that may be differentiated again. ``like`` are the tensors that the
    gradients belong to: through them a second derivative arrives here, and is refused.
    """
    return [(g * upstream).to(x.dtype) for g, x in zip(grads, like, strict=True)]


@scale_gradients.register_fake
def _(grads, upstream, like):
    return [torch.empty_like(g, dtype=x.dtype) for g, x in zip(grads, like, strict=True)]


def _refuse(ctx, *grads):
    raise RuntimeError(
        "lens_kernels computes first derivatives only: its loss cannot be differentiated twice."
        " Use backend='reference' for second derivatives of small problems"
    )


scale_gradients.register_autograd(_refuse)
