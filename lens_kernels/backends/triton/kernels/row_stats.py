"""Sweep 1: the log-sum-exp of every row of a model, computed in one pass over the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from lens_kernels.backends.triton.kernels import launch
from lens_kernels.backends.triton.kernels.device_fns import FLOOR, exp
from lens_kernels.backends.triton.kernels.launch import SplitGrid, Tile
from lens_kernels.backends.triton.kernels.logits import logits_tile, rows_and_part, tiles_of_split
from lens_kernels.backends.triton.kernels.operands import Operand, RowStats
from lens_kernels.backends.triton.kernels.targets import listed_before, without_listed


@triton.jit(do_not_specialize=launch.COUNTS)
def row_stats_kernel(
    operand,
    maximum_ptr,
    total_ptr,
    moment_ptr,
    sum_ptr,
    outside,
    tokens,
    vocab_size,
    tiles_per_split,
    group_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write maxima and sums of exponentials, for a block of rows and a part of the vocabulary.

    Unless ``moment_ptr`` is None, it receives sums of ``exp(u - maximum) (u - maximum)`` of the
    logits ``u``. Unless ``sum_ptr`` is None, it receives sums of ``u``. If ``outside`` is ``(ids,
    count)``, all but the sums of ``u`` leave out the listed ids of each row.
    """
    rows, valid, split = rows_and_part(tokens, group_blocks, BLOCK_N)
    maximum = tl.full((BLOCK_N,), FLOOR, dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_N,), dtype=tl.float32)
    u_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first, last = tiles_of_split(split, vocab_size, tiles_per_split, BLOCK_V)
    if outside is not None:
        ids_ptr, count = outside
        at = listed_before(ids_ptr, count, rows, first * BLOCK_V)
    for tile in range(first, last):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        u = logits_tile(
            operand, rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, True
        )
        if sum_ptr is not None:
            u_sum += tl.sum(tl.where((columns < vocab_size)[None, :], u, 0.0), 1)
        if outside is not None:
            end = (tile + 1) * BLOCK_V
            u, at = without_listed(u, ids_ptr, count, rows, at, columns, end)
        higher = tl.maximum(maximum, tl.max(u, 1))
        if moment_ptr is not None:
            below = u - higher[:, None]
            rise = maximum - higher
            moment = (moment + rise * total) * exp(rise) + tl.sum(exp(below) * below, 1)
        total = total * exp(maximum - higher) + tl.sum(exp(u - higher[:, None]), 1)
        maximum = higher
    offsets = split.to(tl.int64) * tokens + rows
    tl.store(maximum_ptr + offsets, maximum, mask=valid)
    tl.store(total_ptr + offsets, total, mask=valid)
    if moment_ptr is not None:
        tl.store(moment_ptr + offsets, moment, mask=valid)
    if sum_ptr is not None:
        tl.store(sum_ptr + offsets, u_sum, mask=valid)


def row_stats(
    operand: Operand,
    vocab_size: int,
    tile: Tile,
    *,
    entropy: bool = False,
    mean: bool = False,
    outside: Tensor | None = None,
) -> RowStats:
    """Return the log-sum-exp of every row over the vocabulary.

    ``entropy`` and ``mean`` decide whether the result has them. ``outside`` ``(N, K)`` are ids, in
    ascending order in each row, that are left out of log-sum-exp and entropy.
    """
    grid = SplitGrid(operand.tokens, vocab_size, tile, operand.x.device)
    maximum, total = grid.partials(2)
    moment, u_sum = (grid.partials(1)[0] if needed else None for needed in (entropy, mean))
    row_stats_kernel[grid.shape](
        operand.arguments(), maximum, total, moment, u_sum,
        None if outside is None else (outside, outside.shape[1]),
        operand.tokens, vocab_size, grid.tiles_per_split, grid.group_blocks,
        **tile.blocks(), PRECISION=operand.precision, **tile.options(),
    )  # fmt: skip
    stats = RowStats.merged(maximum, total, moment)
    if u_sum is None:
        return stats
    return replace(stats, mean=u_sum.sum(0) / vocab_size - stats.maximum - stats.log_sum)
