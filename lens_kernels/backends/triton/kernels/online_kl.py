"""Sweeps 1 and 2 as one kernel, for divergences that are sums of relative entropies.

Each program computes one part of the vocabulary, tile by tile. The kernel merges the results of
tiles, and torch merges the results of parts. Both use the chain rule from ``relative_entropy``, so
no logit is computed twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lens_kernels import divergence as table
from lens_kernels.backends.triton.kernels import launch
from lens_kernels.backends.triton.kernels.device_fns import FLOOR
from lens_kernels.backends.triton.kernels.launch import SplitGrid, Tile
from lens_kernels.backends.triton.kernels.logits import logits_tile, rows_and_part, tiles_of_split
from lens_kernels.backends.triton.kernels.operands import Operand, RowStats, RowSums
from lens_kernels.backends.triton.kernels.relative_entropy import (
    conditional,
    merged,
    of_tile,
    union,
)
from lens_kernels.options import Divergence


@triton.jit(do_not_specialize=launch.COUNTS)
def online_kl_kernel(
    student,
    teacher,
    maximum_s_ptr,
    total_s_ptr,
    maximum_t_ptr,
    total_t_ptr,
    forward_ptr,
    reverse_ptr,
    tokens,
    vocab_size,
    tiles_per_split,
    group_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write both models' log-sum-exps and relative entropies, for a block of rows and one part."""
    rows, valid, split = rows_and_part(tokens, group_blocks, BLOCK_N)
    maximum_s = tl.full((BLOCK_N,), FLOOR, dtype=tl.float32)
    maximum_t = tl.full((BLOCK_N,), FLOOR, dtype=tl.float32)
    total_s = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total_t = tl.zeros((BLOCK_N,), dtype=tl.float32)
    forward = tl.zeros((BLOCK_N,), dtype=tl.float32)
    reverse = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first, last = tiles_of_split(split, vocab_size, tiles_per_split, BLOCK_V)
    for tile in range(first, last):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        us = logits_tile(
            student, rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, True
        )
        ut = logits_tile(
            teacher, rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, True
        )
        tile_maximum_s, tile_total_s, lq = conditional(us, 1.0)
        tile_maximum_t, tile_total_t, lp = conditional(ut, 1.0)
        # The order of these lines saves registers: the tile's relative entropies come before
        # ``union``.
        forward_part = of_tile(lp, lq, "forward_kl")
        reverse_part = of_tile(lp, lq, "reverse_kl")
        maximum_s, total_s, lq_old, lq_new = union(
            maximum_s, total_s, tile_maximum_s, tile_total_s, 1.0
        )
        maximum_t, total_t, lp_old, lp_new = union(
            maximum_t, total_t, tile_maximum_t, tile_total_t, 1.0
        )
        forward = merged(forward, forward_part, lp_old, lq_old, lp_new, lq_new, "forward_kl")
        reverse = merged(reverse, reverse_part, lp_old, lq_old, lp_new, lq_new, "reverse_kl")
    offsets = split.to(tl.int64) * tokens + rows
    tl.store(maximum_s_ptr + offsets, maximum_s, mask=valid)
    tl.store(total_s_ptr + offsets, total_s, mask=valid)
    tl.store(maximum_t_ptr + offsets, maximum_t, mask=valid)
    tl.store(total_t_ptr + offsets, total_t, mask=valid)
    tl.store(forward_ptr + offsets, forward, mask=valid)
    tl.store(reverse_ptr + offsets, reverse, mask=valid)


def online_kl(
    student: Operand,
    teacher: Operand,
    divergence: Divergence,
    vocab_size: int,
    tile: Tile,
) -> RowSums:
    """Return each row's sums of f and h, with both models' log-sum-exps."""
    grid = SplitGrid(student.tokens, vocab_size, tile, student.x.device)
    partials = grid.partials(6)
    online_kl_kernel[grid.shape](
        student.arguments(), teacher.arguments(), *partials,
        student.tokens, vocab_size, grid.tiles_per_split, grid.group_blocks,
        **tile.blocks(), PRECISION=student.precision, **tile.options(),
    )  # fmt: skip
    maximum_s, total_s, maximum_t, total_t, forward, reverse = partials
    student_stats = RowStats.merged(maximum_s, total_s)
    teacher_stats = RowStats.merged(maximum_t, total_t)
    lq = _log_probabilities(maximum_s, total_s, student_stats)
    lp = _log_probabilities(maximum_t, total_t, teacher_stats)
    p, q = lp.exp(), lq.exp()
    kinds = Divergence.FORWARD_KL, Divergence.REVERSE_KL
    between = [table.pointwise(kind, 0.5)(lp, lq, p, q, (0.5, 0.5))[0] for kind in kinds]
    forward = (_parts_of(p, forward) + between[0]).sum(0)
    reverse = (_parts_of(q, reverse) + between[1]).sum(0)
    if divergence is Divergence.FORWARD_KL:
        # For the forward KL, h is q - p, whose sum is 0.
        return RowSums(forward, torch.zeros_like(forward), student_stats, teacher_stats)
    f = reverse if divergence is Divergence.REVERSE_KL else forward + reverse
    return RowSums(f, reverse, student_stats, teacher_stats)


def _parts_of(shares: Tensor, values: Tensor) -> Tensor:
    return torch.where((shares == 0) & values.isinf(), 0.0, shares * values)


def _log_probabilities(maximum: Tensor, total: Tensor, stats: RowStats) -> Tensor:
    return torch.where(
        total > 0, maximum - stats.maximum + total.log() - stats.log_sum, FLOOR.value
    )
