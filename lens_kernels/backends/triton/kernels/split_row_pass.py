"""The row pass in three kernels, for a vocabulary that is spread over ranks.

A row of this rank's logits is only a part of the whole row. So each sweep of ``row_pass.py`` is a
kernel of its own, and reductions over the ranks come between the kernels. Together they move as
many bytes as ``row_pass_kernel`` with three sweeps.

``student`` and ``teacher`` are ``(products, bias, slope, cap)``. ``teacher`` is None if there are
only labels. There are up to three sets of logits: the student's and the teacher's if there is a
teacher, then the student's at temperature 1 if there are labels. ``temperature`` is None without
labels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels.row_parts import (
    cross_entropy,
    label_gradient,
    maps_of,
    of_row,
    store_grad_stats,
)
from lens_kernels.backends.triton.kernels.row_pass import first_sweep, last_sweep, second_sweep


@triton.jit
def store_statistics(out_ptr, row, maximum, total, factor):
    """Store a row's maximum and sum of exponentials. Return the pointer for the next set."""
    rows = tl.num_programs(0)
    highest, row_total = of_row(maximum, total, factor)
    tl.store(out_ptr + row, highest)
    tl.store(out_ptr + rows + row, row_total)
    return out_ptr + 2 * rows


@triton.jit
def statistics_of(statistics_ptr, index, row, factor):
    """Return the ``statistics`` of a row in the set of logits number ``index``."""
    at = statistics_ptr + (index * tl.num_programs(0) + row) * 2
    return tl.load(at), factor, tl.load(at + 1)


@triton.jit(do_not_specialize=["vocab_size"])
def statistics_kernel(
    student, teacher, out_ptr, stride, vocab_size, temperature,
    LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the maximum ``y`` and the sum of exponentials of each set of logits, ``(S, 2, R)``."""
    row = tl.program_id(0).to(tl.int64)
    factor_s, floor_s, factor_t, floor_t = maps_of(student, teacher)
    maximum_s, total_s, maximum_t, total_t, total_1, _, _ = first_sweep(
        student, teacher, None, row * stride, factor_s, floor_s, factor_t, floor_t,
        temperature, vocab_size, None, False, LANES, GROUP,
    )  # fmt: skip
    if teacher is not None:
        out_ptr = store_statistics(out_ptr, row, maximum_s, total_s, factor_s)
        out_ptr = store_statistics(out_ptr, row, maximum_t, total_t, factor_t)
    if temperature is not None:
        store_statistics(out_ptr, row, maximum_s, total_1, factor_s * temperature)


@triton.jit(do_not_specialize=["vocab_size"])
def sums_kernel(
    student, teacher, statistics_ptr, labels_ptr, out_ptr,
    stride, vocab_size, beta, one_minus_beta, temperature,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write this rank's part of three sums, ``(S, R)``: of ``f``, of ``h``, and the cross entropy.

    ``statistics_ptr`` ``(S, R, 2)`` holds the maximum ``y`` and the log of the sum of exponentials
    over all ranks. Labels of other ranks are not in ``[0, vocab_size)``, and add nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    rows, offset = tl.num_programs(0), row * stride
    factor_s, floor_s, factor_t, floor_t = maps_of(student, teacher)
    sets: tl.constexpr = 0 if teacher is None else 2
    if teacher is not None:
        statistics_s = statistics_of(statistics_ptr, 0, row, factor_s)
        statistics_t = statistics_of(statistics_ptr, 1, row, factor_t)
        f, h = second_sweep(
            student, teacher, offset, floor_s, floor_t, statistics_s, statistics_t,
            vocab_size, beta, one_minus_beta, DIVERGENCE, LANES, GROUP,
        )  # fmt: skip
        loss, h_sum = tl.sum(f, 0), tl.sum(h, 0)
        h_sum = tl.where(loss != loss, loss, h_sum)  # with a NaN loss, the gradient becomes NaN too
        tl.store(out_ptr + row, loss)
        tl.store(out_ptr + rows + row, h_sum)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        own = (label >= 0) & (label < vocab_size)
        statistics = statistics_of(statistics_ptr, sets, row, factor_s * temperature)
        value = cross_entropy(label, student, offset, floor_s, statistics, own)
        tl.store(out_ptr + sets * rows + row, value)


@triton.jit(do_not_specialize=["vocab_size"])
def gradient_kernel(
    student, teacher, statistics_ptr, labels, h_sum_ptr, weight_ptr, grad_ptr, grad_stats,
    stride, grad_stride, vocab_size, beta, one_minus_beta, temperature,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of each row's products.

    ``labels`` is ``(labels, weight)``, and ``h_sum_ptr`` has the sum of ``h`` over all ranks.
    ``grad_stats`` is as for ``row_pass_kernel``.
    """
    row = tl.program_id(0).to(tl.int64)
    factor_s, floor_s, factor_t, floor_t = maps_of(student, teacher)
    statistics_s = statistics_of(statistics_ptr, 0, row, factor_s)
    statistics_t, h_sum, weight, label = statistics_s, 0.0, 0.0, None
    sets: tl.constexpr = 0 if teacher is None else 2
    if teacher is not None:
        statistics_t = statistics_of(statistics_ptr, 1, row, factor_t)
        h_sum, weight = tl.load(h_sum_ptr + row), tl.load(weight_ptr + row)
    if labels is not None:
        labels_ptr, label_weight_ptr = labels
        statistics = statistics_of(statistics_ptr, sets, row, factor_s * temperature)
        label = label_gradient(
            tl.load(labels_ptr + row), label_weight_ptr + row, statistics, temperature
        )
    mass, squares = last_sweep(
        student, teacher, row * stride, floor_s, floor_t, statistics_s, statistics_t,
        h_sum, weight, label, (grad_ptr, row, grad_stride), grad_stats,
        vocab_size, beta, one_minus_beta, DIVERGENCE, LANES, GROUP,
    )  # fmt: skip
    if grad_stats is not None:
        store_grad_stats(grad_stats, row, tl.sum(mass, 0), tl.sum(squares, 0))
