"""Sweep 3: the gradient of the loss with respect to the logits of a chunk of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lens_kernels.backends.row_groups import group_blocks
from lens_kernels.backends.triton.kernels import launch
from lens_kernels.backends.triton.kernels.device_fns import exp
from lens_kernels.backends.triton.kernels.launch import Tile
from lens_kernels.backends.triton.kernels.logits import (
    load_stats,
    logits_tile,
    rows_and_part,
    slope_at,
)
from lens_kernels.backends.triton.kernels.operands import Operand, RowStats, RowSums
from lens_kernels.backends.triton.kernels.pointwise import pointwise
from lens_kernels.backends.triton.kernels.targets import Targets, target_gradient
from lens_kernels.options import Divergence


@triton.jit(do_not_specialize=launch.COUNTS)
def gradients_kernel(
    student,
    teacher,
    student_stats,
    teacher_stats,
    h_ptr,
    weight_ptr,
    labels,
    targets,
    correction,
    grad_ptr,
    grad_stride,
    tokens,
    vocab_size,
    first_column,
    group_blocks,
    beta,
    one_minus_beta,
    temperature,
    DIVERGENCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of one tile, with respect to the products ``x w^T``.

    Columns beyond the vocabulary are written too, as copies of the last column. A mask would make
    the kernel store 2 bytes at a time instead of 16. ``labels``, ``targets`` and ``correction`` are
    None, or the results of ``Labels.arguments()``, ``Targets.arguments()`` and
    ``Standardized.correction()``. Either ``teacher`` or ``targets`` is None.
    """
    rows, valid, part = rows_and_part(tokens, group_blocks, BLOCK_N)
    local = part * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = first_column + local
    us = logits_tile(
        student, rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, False
    )
    _, _, _, _, _, _, slope, cap, own_ptr = student
    if own_ptr is not None:
        own = tl.load(own_ptr + rows)
        slope = slope / own[:, None]
        if cap is not None:
            cap = cap / own[:, None]
    grad = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if teacher is not None:
        ut = logits_tile(
            teacher, rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, False
        )
        maximum_s, log_sum_s = load_stats(student_stats, rows)
        maximum_t, log_sum_t = load_stats(teacher_stats, rows)
        lq = (us - maximum_s) - log_sum_s
        lp = (ut - maximum_t) - log_sum_t
        _, h = pointwise(lp, lq, beta, one_minus_beta, DIVERGENCE)
        grad = h - exp(lq) * tl.load(h_ptr + rows)[:, None]
    if targets is not None:
        end = first_column + (part + 1) * BLOCK_V
        grad = target_gradient(us, targets, rows, columns, end - BLOCK_V, end)
    if correction is not None:
        mean_ptr, factor_ptr = correction
        factor = tl.load(factor_ptr + rows)[:, None]
        grad -= (us - tl.load(mean_ptr + rows)[:, None]) * factor
    if teacher is not None or targets is not None:
        grad *= tl.load(weight_ptr + rows)[:, None]
    if labels is not None:
        # The cross entropy always uses temperature 1.
        labels_ptr, label_stats, label_weight_ptr, total_ptr, at_label, share = labels
        maximum, log_sum = load_stats(label_stats, rows)
        if own_ptr is None:
            log_q = (us * temperature - maximum) - log_sum
        else:
            log_q = (us * own[:, None] - maximum) - log_sum
            temperature = own
        hit = columns[None, :] == tl.load(labels_ptr + rows)[:, None]
        if total_ptr is None:
            residual = exp(log_q) - tl.where(hit, 1.0, 0.0)
        else:
            total = tl.load(total_ptr + rows)[:, None]
            residual = exp(log_q) * total - tl.where(hit, at_label + share, share)
        grad += residual * (tl.load(label_weight_ptr + rows) * temperature)[:, None]
    if cap is not None:
        slope = slope_at(us * (1.0 / cap), slope, cap)
    grad *= slope
    offsets = rows.to(tl.int64)[:, None] * grad_stride + local[None, :]
    tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=valid[:, None])


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels and weights of rows, and the student's statistics at temperature 1.

    The gradient is ``total q - share``, less ``at_label`` at the label. ``total`` is None without
    label smoothing and z-loss. Then the others have their default values.
    """

    labels: Tensor
    stats: RowStats
    weight: Tensor
    total: Tensor | None = None
    at_label: float = 1.0
    share: float = 0.0

    def arguments(self) -> tuple[Any, ...]:
        """Return the labels as an argument of the kernel."""
        stats, further = self.stats.arguments(), (self.total, self.at_label, self.share)
        return self.labels, stats, self.weight, *further


def gradient_chunk(
    student: Operand,
    teacher: Operand | None,
    sums: RowSums | None,
    weight: Tensor,
    labels: Labels | None,
    divergence: Divergence | None,
    beta: float,
    vocab_size: int,
    first_column: int,
    out: Tensor,
    tile: Tile,
    targets: Targets | None = None,
    correction: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write the gradient of ``C`` columns, from ``first_column`` on, to ``out`` ``(N, C)``.

    ``C`` is a multiple of ``tile.block_v``. ``weight`` holds the weights of rows. Without a teacher
    and ``targets``, only the cross entropy has a gradient. ``correction`` is that of standardised
    logits.
    """
    columns = min(out.shape[1], vocab_size - first_column)
    blocks = triton.cdiv(student.tokens, tile.block_n)
    programs = blocks * triton.cdiv(columns, tile.block_v)
    comparison: tuple[Any, ...] = None, None, None, None
    if teacher is not None and sums is not None:
        stats = sums.student.arguments(), sums.teacher.arguments()
        comparison = teacher.arguments(), *stats, sums.h
    gradients_kernel[(programs,)](
        student.arguments(), *comparison, weight,
        None if labels is None else labels.arguments(),
        None if targets is None else targets.arguments(), correction, out, out.stride(0),
        student.tokens, vocab_size, first_column, group_blocks(student.tokens, tile.block_n),
        beta, 1.0 - beta, student.temperature,
        DIVERGENCE=None if divergence is None else divergence.value,
        **tile.blocks(), PRECISION=student.precision, **tile.options(),
    )  # fmt: skip
