"""Sparse targets in the sweeps: finds the listed vocabulary entries of each row in a tile.

Each row lists ``count`` ids in ascending order. A program first skips the ids before its part of
the vocabulary. Then it compares each tile only with the ids inside the tile. A row lists few ids in
a tile, so this takes less time than a comparison with all ids. The formulas are in ``targets.py``
of the ``torch`` backend.

The targets are subtracted inside the sweep, so that ``q sum(t) - t`` is rounded once. Sparse GEMMs
outside the sweep would round ``q sum(t)`` alone. Its rounding error may exceed the difference.
They would also need atomics to add to the gradient of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lens_kernels.backends.triton.kernels.device_fns import FLOOR, exp
from lens_kernels.backends.triton.kernels.logits import load_stats
from lens_kernels.backends.triton.kernels.operands import RowStats

# The id of an entry without a target. It is above all columns.
NO_ID = tl.constexpr((1 << 31) - 1)


@triton.jit
def listed_before(ids_ptr, count, rows, column):
    """Return how many ids of each row are below ``column``."""
    at = tl.zeros(rows.shape, tl.int32)
    for k in range(0, count):
        ids = tl.load(ids_ptr + rows.to(tl.int64) * count + k)
        at += (ids < column).to(tl.int32)
    return at


@triton.jit
def listed_at(ids_ptr, count, rows, at):
    """Return the id number ``at`` of each row, or ``NO_ID`` after the last."""
    return tl.load(ids_ptr + rows.to(tl.int64) * count + at, mask=at < count, other=NO_ID)


@triton.jit
def without_listed(u, ids_ptr, count, rows, at, columns, end):
    """Return the logits ``u`` of a tile with ``FLOOR`` at listed ids, and ``at`` after the tile.

    ``at`` is the number of ids before the tile, and ``end`` the column after it.
    """
    ids = listed_at(ids_ptr, count, rows, at)
    while tl.min(ids, 0) < end:
        u = tl.where(columns[None, :] == ids[:, None], FLOOR, u)
        at += (ids < end).to(tl.int32)
        ids = listed_at(ids_ptr, count, rows, at)
    return u, at


@triton.jit
def target_gradient(us, targets, rows, columns, first, end):
    """Return the gradient of a tile with respect to the logits ``us``.

    ``targets`` is the result of ``Targets.arguments()``. The tile has the columns from ``first`` to
    ``end``.
    """
    ids_ptr, values_ptr, count, stats, total_ptr, outside_ptr, share_ptr = targets
    maximum, log_sum = load_stats(stats, rows)
    q = exp((us - maximum) - log_sum)
    total = tl.load(total_ptr + rows)[:, None]
    if outside_ptr is None:
        grad = q * total
    else:
        grad = q * tl.load(outside_ptr + rows)[:, None]
    if share_ptr is not None:
        grad -= tl.load(share_ptr + rows)[:, None]
    at = listed_before(ids_ptr, count, rows, first)
    ids = listed_at(ids_ptr, count, rows, at)
    while tl.min(ids, 0) < end:
        hit = columns[None, :] == ids[:, None]
        place = values_ptr + rows.to(tl.int64) * count + at
        value = tl.load(place, mask=at < count, other=0.0)[:, None]
        if outside_ptr is None:
            grad -= tl.where(hit, value, 0.0)
        else:
            grad = tl.where(hit, q * total - value, grad)
        at += (ids < end).to(tl.int32)
        ids = listed_at(ids_ptr, count, rows, at)
    return grad


@dataclass(frozen=True, eq=False)
class Targets:
    """The sparse targets ``t`` of rows, and the numbers of each row for their gradient.

    ``ids`` ``(N, K)`` are int32 and ascending in each row. The gradient is ``total q - t - share``
    at listed ids, and ``outside q - share`` elsewhere. ``outside`` is None if it equals ``total``.
    ``stats`` are the student's log-sum-exps.
    """

    ids: Tensor
    values: Tensor
    stats: RowStats
    total: Tensor
    outside: Tensor | None = None
    share: Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        """Return the targets as an argument of the kernel."""
        count, stats = self.ids.shape[1], self.stats.arguments()
        return self.ids, self.values, count, stats, self.total, self.outside, self.share
