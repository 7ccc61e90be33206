"""The float64 oracle as a backend called ``reference``, added as CONTRIBUTING.md describes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from lens_kernels.call import LossCall, LossResult
from lens_kernels.cost import dense as dense_cost
from lens_kernels.dispatch import Backend
from reference import dense


def rows(call: LossCall) -> Tensor:
    """Return the loss of each lens pair and token, in float64. Masked tokens have loss 0."""
    every = torch.arange(call.row_weight.shape[1])
    kept = every if call.mask is None else every[call.mask]
    values = dense.rows(
        [h[kept] for h in call.student_hidden],
        [h[kept] for h in call.teacher_hidden],
        call.student_head,
        call.teacher_heads[0] if call.teacher_heads else None,
        divergences=[d.value for d in call.divergences],
        normed=call.normed,
        beta=call.beta,
        temperature=call.temperature,
        vocab_size=call.vocab_size,
        labels=None if call.labels is None else call.labels[kept],
    )
    return values.new_zeros(call.row_weight.shape).index_copy(1, kept, values)


def evaluate(call: LossCall) -> LossResult:
    """Return the losses of a call, and their gradients by autograd.

    Autograd is off inside a custom operator, so another thread computes the gradients.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_evaluate, call).result()


def _evaluate(call: LossCall) -> LossResult:
    leaves = {key: x.detach().requires_grad_() for key, x in call.needing_grad().items()}
    tensors = {id(x): leaves[key] for key, x in call.needing_grad().items()}
    call = replace(
        call,
        student_hidden=[leaves.get(i, h) for i, h in enumerate(call.student_hidden)],
        student_head=call.student_head.map(lambda x: tensors.get(id(x), x)),
    )
    grads: dict[int | str, Tensor] = {}
    with torch.enable_grad():
        found = rows(call)
        kept = slice(None) if call.mask is None else call.mask
        loss = (call.row_weight.double() * found)[:, kept].sum()
        for key, x in leaves.items():
            (grad,) = torch.autograd.grad(loss, x, retain_graph=True, materialize_grads=True)
            grads[key] = grad.to(call.compute_dtype)
    found = found.detach().to(call.compute_dtype)
    return LossResult(found, grads, found.new_zeros(()))


REFERENCE = Backend(
    "reference",
    __name__,
    dense_cost,
    auto_excluded_reason=lambda *args: "only if requested by name",
)
