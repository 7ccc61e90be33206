"""Sweep 1: the log-sum-exp of every row, online over the vocabulary, for one model."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lens_kernels.backends.triton import launch
from lens_kernels.backends.triton.device_fns import FLOOR, exp
from lens_kernels.backends.triton.operands import Operand, RowStats
from lens_kernels.backends.triton.tile import block_of_rows, logits_tile, tiles_of_split
from lens_kernels.backends.triton.tiles import Tile


@triton.jit(do_not_specialize=launch.COUNTS)
def row_stats_kernel(
    side,
    maximum_ptr,
    total_ptr,
    tokens,
    vocab_size,
    tiles_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the maximum and the sum of exponentials of this program's rows over one split."""
    rows, exist = block_of_rows(tokens, BLOCK_N)
    maximum = tl.full((BLOCK_N,), FLOOR, dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first, last = tiles_of_split(vocab_size, tiles_per_split, BLOCK_V)
    for tile in range(first, last):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        u = logits_tile(side, rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, True)
        higher = tl.maximum(maximum, tl.max(u, 1))
        total = total * exp(maximum - higher) + tl.sum(exp(u - higher[:, None]), 1)
        maximum = higher
    at = tl.program_id(1).to(tl.int64) * tokens + rows
    tl.store(maximum_ptr + at, maximum, mask=exist)
    tl.store(total_ptr + at, total, mask=exist)


def row_stats(side: Operand, vocab_size: int, tile: Tile) -> RowStats:
    """Return the log-sum-exp of every row over the vocabulary."""
    grid = launch.Splits(side.tokens, vocab_size, tile, side.x.device)
    maximum, total = grid.partials(2)
    row_stats_kernel[grid.shape](
        side.arguments(), maximum, total, side.tokens, vocab_size, grid.tiles_per_split,
        **tile.blocks(), PRECISION=side.precision, **tile.options(),
    )  # fmt: skip
    return merge(maximum, total)


def merge(maximum: Tensor, total: Tensor) -> RowStats:
    """Merge the splits, ``(S, N)``, in their order."""
    highest = maximum.amax(0)
    return RowStats(highest, (total * torch.exp(maximum - highest)).sum(0).log())
