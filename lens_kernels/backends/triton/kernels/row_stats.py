"""Sweep 1: the log-sum-exp of every row of a model, computed in one pass over the vocabulary."""

from __future__ import annotations

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels import launch
from lens_kernels.backends.triton.kernels.device_fns import FLOOR, exp
from lens_kernels.backends.triton.kernels.launch import SplitGrid, Tile
from lens_kernels.backends.triton.kernels.logits import logits_tile, rows_and_part, tiles_of_split
from lens_kernels.backends.triton.kernels.operands import Operand, RowStats


@triton.jit(do_not_specialize=launch.COUNTS)
def row_stats_kernel(
    operand,
    maximum_ptr,
    total_ptr,
    tokens,
    vocab_size,
    tiles_per_split,
    group_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write maxima and sums of exponentials, for a block of rows and a part of the vocabulary."""
    rows, valid, split = rows_and_part(tokens, group_blocks, BLOCK_N)
    maximum = tl.full((BLOCK_N,), FLOOR, dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first, last = tiles_of_split(split, vocab_size, tiles_per_split, BLOCK_V)
    for tile in range(first, last):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        u = logits_tile(
            operand, rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, True
        )
        higher = tl.maximum(maximum, tl.max(u, 1))
        total = total * exp(maximum - higher) + tl.sum(exp(u - higher[:, None]), 1)
        maximum = higher
    offsets = split.to(tl.int64) * tokens + rows
    tl.store(maximum_ptr + offsets, maximum, mask=valid)
    tl.store(total_ptr + offsets, total, mask=valid)


def row_stats(operand: Operand, vocab_size: int, tile: Tile) -> RowStats:
    """Return the log-sum-exp of every row over the vocabulary."""
    grid = SplitGrid(operand.tokens, vocab_size, tile, operand.x.device)
    maximum, total = grid.partials(2)
    row_stats_kernel[grid.shape](
        operand.arguments(), maximum, total,
        operand.tokens, vocab_size, grid.tiles_per_split, grid.group_blocks,
        **tile.blocks(), PRECISION=operand.precision, **tile.options(),
    )  # fmt: skip
    return RowStats.merged(maximum, total)
