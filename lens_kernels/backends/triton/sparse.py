"""Compares the student with sparse targets, in one sweep over the vocabulary.

The formulas are in ``targets.py`` of the ``torch`` backend. The sweep computes the student's
log-sum-exps. The logits at the listed ids are computed apart, because they need only ``K`` rows of
the head for each token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lens_kernels.backends.triton.kernels.launch import Tile
from lens_kernels.backends.triton.kernels.operands import Operand, RowStats
from lens_kernels.backends.triton.kernels.row_stats import row_stats
from lens_kernels.backends.triton.kernels.targets import NO_ID, Targets
from lens_kernels.divergence import FLOOR
from lens_kernels.targets import TargetRows

TINY = torch.finfo(torch.float32).tiny


def compare(
    student: Operand, rows: TargetRows, vocab_size: int, tile: Tile, moment: bool
) -> tuple[Tensor, Targets, Tensor | None]:
    """Return the losses of rows, the targets for the gradient, and the sums of ``G log q``.

    The sums are None unless ``moment`` is true.
    """
    ids, values, rest, smoothing = rows.ids, rows.values, rows.rest, rows.smoothing
    if rest is not None:
        # Padding belongs to the rest of the vocabulary.
        ids, order = ids.where(values > 0, NO_ID.value).sort(-1)
        values = values.gather(-1, order)
    listed = ids.int()
    stats = row_stats(
        student, vocab_size, tile, entropy=moment, mean=smoothing is not None,
        outside=None if rest is None else listed,
    )  # fmt: skip
    logits = student.logits_at(ids.clamp(max=vocab_size - 1))
    outside = None
    if rest is not None:
        # The probability outside the listed ids may be far smaller than the rounding error of
        # theirs. So the sweep sums it by itself.
        outside, stats = stats, _union(stats, logits.where(values > 0, FLOOR))
    lq = stats.log_probability(logits)
    loss = rows.constant - (values * lq).sum(-1)
    total, share, factor = values.sum(-1), None, None
    sums = torch.zeros_like(loss)
    if smoothing is not None:
        assert stats.mean is not None
        loss = loss - smoothing * stats.mean
        total, share = total + smoothing, smoothing / vocab_size
        sums = sums + smoothing * stats.mean
    if moment:
        sums = sums + (values * lq).sum(-1)
    if outside is not None and rest is not None:
        log_mass = outside.maximum - stats.maximum + outside.log_sum - stats.log_sum
        mass = log_mass.exp().clamp(min=TINY)
        log_mass = mass.log()
        loss, total = loss - rest * log_mass, total + rest
        factor = total - rest / mass
        if moment:
            assert outside.entropy is not None
            inside = (lq.exp() * lq).where(values > 0, 0.0).sum(-1)
            mean_outside = log_mass - outside.entropy
            sums = total * (mass * mean_outside + inside) - sums - rest * mean_outside
    elif moment:
        assert stats.entropy is not None
        sums = -total * stats.entropy - sums
    targets = Targets(listed, values, stats, total, factor, share)
    return loss, targets, sums if moment else None


def _union(outside: RowStats, logits: Tensor) -> RowStats:
    """Return the log-sum-exps over the vocabulary, from those outside the listed ``logits``."""
    highest = torch.maximum(outside.maximum, logits.amax(-1))
    total = (outside.maximum - highest + outside.log_sum).exp()
    return RowStats(highest, (total + (logits - highest[:, None]).exp().sum(-1)).log())
