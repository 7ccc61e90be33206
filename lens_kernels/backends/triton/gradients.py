"""Sweep 3: the gradient of a chunk of the vocabulary's logits."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lens_kernels.backends.triton import launch
from lens_kernels.backends.triton.device_fns import exp
from lens_kernels.backends.triton.operands import Operand, RowStats, RowSums
from lens_kernels.backends.triton.pointwise import pointwise
from lens_kernels.backends.triton.tile import block_of_rows, logits_tile
from lens_kernels.spec import Divergence


# Weights of rows are slices of a matrix, at any address.
@triton.jit(
    do_not_specialize=launch.COUNTS,
    do_not_specialize_on_alignment=["weight_ptr", "label_weight_ptr"],
)
def gradients_kernel(
    xs_ptr, ws_ptr, bias_s_ptr, width_s, xs_stride, ws_stride, slope_s, cap_s,
    xt_ptr, wt_ptr, bias_t_ptr, width_t, xt_stride, wt_stride, slope_t, cap_t,
    maximum_s_ptr, log_sum_s_ptr, maximum_t_ptr, log_sum_t_ptr,
    h_ptr,
    weight_ptr,
    labels_ptr, label_maximum_ptr, label_log_sum_ptr, label_weight_ptr,
    grad_ptr,
    grad_stride,
    tokens,
    vocab_size,
    first_column,
    beta,
    temperature,
    DIVERGENCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient with respect to the raw products of one tile.

    Columns of the tile beyond the vocabulary are written too, and repeat the last one: a mask over
    columns would turn 16-byte stores into 2-byte ones.
    """
    rows, exist = block_of_rows(tokens, BLOCK_N)
    local = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = first_column + local
    us = logits_tile(
        xs_ptr, ws_ptr, bias_s_ptr, width_s, xs_stride, ws_stride, slope_s, cap_s,
        rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, False,
    )  # fmt: skip
    ut = logits_tile(
        xt_ptr, wt_ptr, bias_t_ptr, width_t, xt_stride, wt_stride, slope_t, cap_t,
        rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, False,
    )  # fmt: skip
    slope = slope_s
    if cap_s is not None:
        t = us * (1.0 / cap_s)
        slope = slope_s - (t * t) * slope_s
    lq = (us - tl.load(maximum_s_ptr + rows)[:, None]) - tl.load(log_sum_s_ptr + rows)[:, None]
    lp = (ut - tl.load(maximum_t_ptr + rows)[:, None]) - tl.load(log_sum_t_ptr + rows)[:, None]
    _, h = pointwise(lp, lq, beta, DIVERGENCE)
    grad = h - exp(lq) * tl.load(h_ptr + rows)[:, None]
    grad *= tl.load(weight_ptr + rows)[:, None]
    if labels_ptr is not None:
        # Cross entropy knows no temperature.
        log_q = us * temperature - tl.load(label_maximum_ptr + rows)[:, None]
        log_q -= tl.load(label_log_sum_ptr + rows)[:, None]
        hit = columns[None, :] == tl.load(labels_ptr + rows)[:, None]
        residual = exp(log_q) - tl.where(hit, 1.0, 0.0)
        grad += residual * (tl.load(label_weight_ptr + rows) * temperature)[:, None]
    grad *= slope
    at = rows.to(tl.int64)[:, None] * grad_stride + local[None, :]
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=exist[:, None])


@dataclass(frozen=True, eq=False)
class Labels:
    """The label of each row, the student's statistics at temperature 1, the weight of a row."""

    labels: Tensor
    stats: RowStats
    weight: Tensor


def gradient_chunk(
    student: Operand,
    teacher: Operand,
    sums: RowSums,
    weight: Tensor,
    labels: Labels | None,
    divergence: Divergence,
    beta: float,
    vocab_size: int,
    first_column: int,
    out: Tensor,
    tile: launch.Tile,
) -> None:
    """Write into ``out`` ``(N, C)`` the gradient of columns ``first_column`` and on.

    ``C`` is a multiple of the tile's. Rows count by ``weight``.
    """
    label_args: tuple[Tensor | None, ...] = (None,) * 4
    if labels is not None:
        stats = labels.stats
        label_args = labels.labels, stats.maximum, stats.log_sum, labels.weight
    columns = min(out.shape[1], vocab_size - first_column)
    grid = triton.cdiv(student.tokens, tile.block_n), triton.cdiv(columns, tile.block_v)
    gradients_kernel[grid](
        *student.arguments(), *teacher.arguments(),
        sums.student.maximum, sums.student.log_sum, sums.teacher.maximum, sums.teacher.log_sum,
        sums.h, weight, *label_args, out, out.stride(0),
        student.tokens, vocab_size, first_column, beta, student.temperature,
        DIVERGENCE=divergence.value, **tile.blocks(), PRECISION=student.precision,
        **tile.options(),
    )  # fmt: skip
