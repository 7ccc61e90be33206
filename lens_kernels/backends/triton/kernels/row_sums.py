"""Sweep 2: the sums of a divergence's ``f`` and ``h`` over the vocabulary, for every row."""

from __future__ import annotations

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels import launch
from lens_kernels.backends.triton.kernels.launch import SplitGrid, Tile
from lens_kernels.backends.triton.kernels.logits import (
    load_stats,
    logits_tile,
    rows_and_part,
    tiles_of_split,
)
from lens_kernels.backends.triton.kernels.operands import Operand, RowStats, RowSums
from lens_kernels.backends.triton.kernels.pointwise import pointwise
from lens_kernels.backends.triton.kernels.row_parts import summands
from lens_kernels.options import Divergence


@triton.jit(do_not_specialize=launch.COUNTS)
def row_sums_kernel(
    student,
    teacher,
    student_stats,
    teacher_stats,
    f_ptr,
    h_ptr,
    moment_ptr,
    tokens,
    vocab_size,
    tiles_per_split,
    group_blocks,
    beta,
    one_minus_beta,
    DIVERGENCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the sums of f and h, for a block of rows and a part of the vocabulary.

    Unless ``moment_ptr`` is None, it receives sums of ``h log q``.
    """
    rows, valid, split = rows_and_part(tokens, group_blocks, BLOCK_N)
    maximum_s, log_sum_s = load_stats(student_stats, rows)
    maximum_t, log_sum_t = load_stats(teacher_stats, rows)
    f_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    h_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first, last = tiles_of_split(split, vocab_size, tiles_per_split, BLOCK_V)
    for tile in range(first, last):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        us = logits_tile(
            student, rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, True
        )
        ut = logits_tile(
            teacher, rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, True
        )
        lq = (us - maximum_s) - log_sum_s
        lp = (ut - maximum_t) - log_sum_t
        f, summand = summands(lp, lq, beta, one_minus_beta, DIVERGENCE)
        f_sum += tl.sum(f, 1)
        h_sum += tl.sum(summand, 1)
        if moment_ptr is not None:
            _, h = pointwise(lp, lq, beta, one_minus_beta, DIVERGENCE)
            moment += tl.sum(h * lq, 1)
    offsets = split.to(tl.int64) * tokens + rows
    tl.store(f_ptr + offsets, f_sum, mask=valid)
    tl.store(h_ptr + offsets, h_sum, mask=valid)
    if moment_ptr is not None:
        tl.store(moment_ptr + offsets, moment, mask=valid)


def row_sums(
    student: Operand,
    teacher: Operand,
    student_stats: RowStats,
    teacher_stats: RowStats,
    divergence: Divergence,
    beta: float,
    vocab_size: int,
    tile: Tile,
    moment: bool = False,
) -> RowSums:
    """Return the sums of f and h of every row, given the log-sum-exps of both models.

    ``moment`` decides whether the result has the sums of ``h log q``.
    """
    grid = SplitGrid(student.tokens, vocab_size, tile, student.x.device)
    f, h = grid.partials(2)
    moments = grid.partials(1)[0] if moment else None
    row_sums_kernel[grid.shape](
        student.arguments(), teacher.arguments(),
        student_stats.arguments(), teacher_stats.arguments(), f, h, moments,
        student.tokens, vocab_size, grid.tiles_per_split, grid.group_blocks, beta, 1.0 - beta,
        DIVERGENCE=divergence.value, **tile.blocks(), PRECISION=student.precision,
        **tile.options(),
    )  # fmt: skip
    whole = None if moments is None else moments.sum(0)
    return RowSums(f.sum(0), h.sum(0), student_stats, teacher_stats, whole)
