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

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lens_kernels.backends.torch.standardized import Moments, Standardized
from lens_kernels.divergence import FLOOR
from lens_kernels.lens import LogitMap


def softmax(u: Tensor, statistics: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-softmax and softmax, with one exponential per entry, and the log-sum-exp.

    The log-sum-exp is kept as two numbers, the maximum and the log of the sum. A single fp32 number
    near 60 would put an error of 4e-6 into every probability. Log-softmax and softmax share their
    rounding error, so it changes divergences only in second order. If the two numbers are known,
    they are given as ``statistics``.
    """
    if statistics is not None:
        maximum, log_total = statistics
        log = (u - maximum) - log_total
        return log, log.exp(), maximum + log_total
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
    and the entropy of each row are returned too. ``total`` ``(R, 1)`` is the sum of ``values`` over
    all ranks, if the vocabulary is sharded.
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
    total: Tensor | None = None


class Student(NamedTuple):
    """The student's distribution in the rows of a target, over all entries or those of a rank.

    ``slope`` is the derivative of logits with respect to products. ``picked`` is ``log_q`` at the
    target's ``ids``. ``outside`` is ``q`` with zeros there, if the target has a ``rest``.
    """

    log_q: Tensor
    q: Tensor
    lse: Tensor
    slope: Tensor | float
    standardized: Standardized | None
    picked: Tensor
    outside: Tensor | None

    @staticmethod
    def of(
        zs: Tensor,
        row: Target,
        statistics: Sequence[Tensor] | None = None,
        moments: Moments | None = None,
    ) -> Student:
        """Return the distribution of the products ``zs``.

        ``statistics`` and ``moments`` are those of the whole vocabulary, if it is sharded.
        """
        logits, slope, standardized = student_logits(zs, row, moments)
        log_q, q, lse = softmax(logits.clamp(min=FLOOR), statistics)
        picked, outside = log_q.gather(-1, row.ids), None
        if row.values is not None and row.rest is not None:
            # Subtracting q at ids would leave rounding errors, which may exceed a small r.
            given = (row.values > 0).to(q.dtype)
            listed = torch.zeros_like(q).scatter_add(-1, row.ids, given)
            outside = q.where(listed == 0, 0.0)
        return Student(log_q, q, lse, slope, standardized, picked, outside)


def student_logits(
    zs: Tensor, row: Target, moments: Moments | None = None
) -> tuple[Tensor, Tensor | float, Standardized | None]:
    """Return the student's logits, their slope, and their standardisation or None."""
    logits, slope = row.student(zs)
    if row.inverse_temperature is None:
        return logits, slope, None
    standardized = Standardized.of(logits, row.inverse_temperature, moments)
    return standardized.logits, slope, standardized


class Sums(NamedTuple):
    """Sums over the vocabulary, ``(R,)`` each. If it is sharded, ranks add theirs.

    ``loss`` is the part of the loss that is linear in ``log q``. ``outside`` is ``r``. ``product``
    is the sum of ``G z'`` without the part of ``rest``. ``outside_product`` is the sum of ``q z'``
    outside ``ids``.
    """

    loss: Tensor
    outside: Tensor | None
    product: Tensor | None
    outside_product: Tensor | None

    @staticmethod
    def of(row: Target, student: Student, vocab_size: int, with_grad: bool) -> Sums:
        """Return the sums over the entries of ``student``, of ``vocab_size`` entries in all."""
        values, picked = row.values, student.picked
        loss = -picked[:, 0] if values is None else -(values * picked).sum(-1)
        if row.smoothing is not None:
            loss = loss - row.smoothing * (student.log_q.sum(-1) / vocab_size)
        outside = None if student.outside is None else student.outside.sum(-1)
        product = outside_product = None
        if student.standardized is not None and with_grad:
            # The entries of z' sum to 0, so ``smoothing`` adds nothing.
            z, total = student.standardized.z, _total(row, student.lse)
            product = (student.q * z).sum(-1)
            product = product if total is None else product * total[:, 0]
            at_ids = z.gather(-1, row.ids)
            product = product - (at_ids if values is None else values * at_ids).sum(-1)
            if student.outside is not None:
                outside_product = (student.outside * z).sum(-1)
        return Sums(loss, outside, product, outside_product)

    @staticmethod
    def read(row: Target, with_grad: bool, sums: Iterator[Tensor]) -> Sums:
        """Return the next of ``sums``, which are in the order of the fields."""
        rest, product = row.rest is not None, with_grad and row.inverse_temperature is not None
        loss = next(sums)
        return Sums(loss, *(next(sums) if x else None for x in (rest, product, rest and product)))


def _total(row: Target, lse: Tensor) -> Tensor | None:
    """Return ``sum(t)``, ``(R, 1)`` or a number, or None if it is 1."""
    total = None
    if row.values is not None:
        total = row.values.sum(-1, keepdim=True) if row.total is None else row.total
        if row.smoothing is not None:
            total = total + _beside_rows(row.smoothing)
        if row.rest is not None:
            total = total + row.rest[:, None]
    if row.z_loss is not None:
        extra = 2 * row.z_loss * lse
        total = 1 + extra if total is None else total + extra
    return total


def loss_of(row: Target, sums: Sums, lse: Tensor) -> Tensor:
    """Return the loss of each row, before ``clip``. ``lse`` is the log-sum-exp, ``(R, 1)``."""
    loss = sums.loss
    if row.constant is not None:
        loss = loss + row.constant
    if row.z_loss is not None:
        loss = loss + row.z_loss * lse[:, 0].square()
    if row.rest is not None:
        loss = loss - row.rest * _positive(sums.outside).log()
    return loss


def gradient(
    row: Target, student: Student, sums: Sums, loss: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the weighted losses in two parts: for all entries, and for ``ids``.

    ``loss`` is the result of ``loss_of``.
    """
    grad, total = student.q, _total(row, student.lse)
    if total is not None:
        grad = grad * total
    weight = row.weight if row.clip is None else torch.where(loss > row.clip, 0.0, row.weight)
    product = sums.product
    if row.rest is not None and student.outside is not None:
        share = row.rest / _positive(sums.outside)
        grad = grad - student.outside * share[:, None]
        if product is not None and sums.outside_product is not None:
            product = product - sums.outside_product * share
    if row.smoothing is not None:
        grad = grad - _beside_rows(row.smoothing) / vocab_size
    scale = weight[:, None] * student.slope
    if student.standardized is not None:
        assert product is not None
        grad = student.standardized.backward(grad, product[:, None], vocab_size)
        scale = scale * student.standardized.scale
    at_ids = scale.expand_as(grad).gather(-1, row.ids)
    if row.values is not None:
        at_ids = at_ids * row.values
    return grad * scale, -at_ids


def target_rows(
    zs: Tensor, row: Target, with_grad: bool
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Return the losses, and the gradient in two parts: for all entries, and for ``ids``.

    The second part is a list with one tensor ``(R, K)``, or an empty list without gradients.
    """
    vocab_size, student = zs.shape[-1], Student.of(zs, row)
    sums = Sums.of(row, student, vocab_size, with_grad)
    loss = loss_of(row, sums, student.lse)
    losses = [loss if row.clip is None else loss.clamp(max=row.clip)]
    if row.reports:
        losses += [student.lse[:, 0], -(student.q * student.log_q).sum(-1)]
    if not with_grad:
        return losses, None, []
    grad, at_ids = gradient(row, student, sums, loss, vocab_size)
    return losses, grad, [at_ids]


def _positive(mass: Tensor | None) -> Tensor:
    assert mass is not None
    return mass.clamp(min=torch.finfo(mass.dtype).tiny)


def _beside_rows(numbers: Tensor) -> Tensor:
    """Return one number, or one for each row, in a shape that broadcasts over the vocabulary.

    A number stays a 0-dim tensor, because only those may be on the CPU if the rows are on a GPU.
    """
    return numbers[:, None] if numbers.dim() else numbers
