"""The losses of targets with few entries, in the torch pass: labels, or a sparse teacher.

A row ``t`` of targets holds the probability ``values[k]`` at the vocabulary entry ``ids[k]``.
``smoothing`` is a probability that is spread evenly over the vocabulary. ``rest`` is the total
probability of all entries outside ``ids``. The student's distribution is ``q``, and ``r`` is its
sum outside ``ids``::

    loss = constant - sum_k values_k log q_k - smoothing mean_v log q_v - rest log r
    G_v  = q_v sum(t) - t_v - rest q_v / r [v outside ids]

``sum(t)`` includes ``smoothing`` and ``rest``. ``G`` is the logit gradient. It is first computed
without ``-values``, which is added at ``ids`` afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lens_kernels.backends.torch.standardized import Standardized
from lens_kernels.divergence import FLOOR
from lens_kernels.lens import LogitMap


def softmax(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-softmax and softmax, with one exponential per entry, and the log-sum-exp.

    The log-sum-exp is kept as two numbers, the maximum and the log of the sum. A single fp32 number
    near 60 would put an error of 4e-6 into every probability. Log-softmax and softmax share their
    rounding error, so it changes divergences only in second order.
    """
    maximum = u.amax(-1, keepdim=True)
    u = u - maximum
    powers = u.exp()
    log_total = powers.sum(-1, keepdim=True).log()
    return u - log_total, powers * (-log_total).exp(), maximum + log_total


class Target(NamedTuple):
    """The targets of a tile of rows. Numbers are 0-dim tensors.

    ``values`` ``(R, K)`` is None if each row has one entry with the value 1. ``smoothing`` is one
    number, or one for each row. ``z_loss`` adds ``z_loss * lse^2`` to the loss. Losses above
    ``clip`` become ``clip``, and have no gradient. ``inverse_temperature`` is given if logits are
    standardised; then ``student`` is the map at temperature 1. With ``reports``, the log-sum-exp
    and the entropy of each row are returned too.
    """

    ids: Tensor
    values: Tensor | None
    weight: Tensor
    student: LogitMap
    smoothing: Tensor | None = None
    rest: Tensor | None = None
    constant: Tensor | None = None
    z_loss: Tensor | None = None
    clip: Tensor | None = None
    inverse_temperature: Tensor | None = None
    reports: bool = False


def target_rows(
    zs: Tensor, row: Target, with_grad: bool
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Return the losses, and the gradient in two parts: for all entries, and for ``ids``.

    The second part is a list with one tensor ``(R, K)``, or an empty list without gradients.
    """
    logits, slope = row.student(zs)
    standardized = None
    if row.inverse_temperature is not None:
        standardized = Standardized.of(logits, row.inverse_temperature)
        logits = standardized.logits
    lq, q, lse = softmax(logits.clamp(min=FLOOR))
    picked = lq.gather(-1, row.ids)
    values, total, grad = row.values, None, q
    if values is None:
        loss = -picked[:, 0]
    else:
        loss, total = -(values * picked).sum(-1), values.sum(-1, keepdim=True)
        if row.smoothing is not None:
            loss = loss - row.smoothing * lq.mean(-1)
            total = total + _beside_rows(row.smoothing)
        if row.rest is not None:
            total = total + row.rest[:, None]
    if row.constant is not None:
        loss = loss + row.constant
    if row.z_loss is not None:
        loss = loss + row.z_loss * lse[:, 0].square()
        extra = 2 * row.z_loss * lse
        total = 1 + extra if total is None else total + extra
    if total is not None:
        grad = grad * total
    if values is not None and row.rest is not None:
        # Subtracting ``q`` at ``ids`` would leave rounding errors, which may exceed a small ``r``.
        listed = torch.zeros_like(q).scatter_add(-1, row.ids, (values > 0).to(q.dtype))
        outside = q.where(listed == 0, 0.0)
        mass = outside.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
        loss = loss - row.rest * mass[:, 0].log()
        grad = grad - outside * (row.rest[:, None] / mass)
    losses = [loss]
    if row.reports:
        losses += [lse[:, 0], -(q * lq).sum(-1)]
    weight = row.weight
    if row.clip is not None:
        weight = torch.where(loss > row.clip, 0.0, weight)
        losses[0] = loss.clamp(max=row.clip)
    if not with_grad:
        return losses, None, []
    if row.smoothing is not None:
        grad = grad - _beside_rows(row.smoothing) / zs.shape[-1]
    scale = weight[:, None] * slope
    if standardized is not None:
        at_ids = picked.new_ones(()) if values is None else values
        grad, scale = standardized.backward(grad, row.ids, at_ids), scale * standardized.scale
    at_ids = scale.expand_as(zs).gather(-1, row.ids)
    if values is not None:
        at_ids = at_ids * values
    return losses, grad * scale, [-at_ids]


def _beside_rows(numbers: Tensor) -> Tensor:
    """Return one number, or one for each row, in a shape that broadcasts over the vocabulary.

    A number stays a 0-dim tensor, because only those may be on the CPU if the rows are on a GPU.
    """
    return numbers[:, None] if numbers.dim() else numbers
