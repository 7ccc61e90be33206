"""Turns rows of logits into losses and gradients. Each program processes one row.

A row holds the products of a hidden state with the whole head, in fp32. The first sweep over a row
computes the log-sum-exps of both models. The second sweep computes the sums of ``f`` and ``h``.
Relative entropies skip the second sweep, because the first sweep computes their sums. The last
sweep writes the logit gradient.

Each thread reads a group of neighbouring entries at a time, so that loads and stores take 16 bytes
at once. Sums are kept per thread until the end of a sweep.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels.pointwise import pointwise
from lens_kernels.backends.triton.kernels.relative_entropy import (
    conditional,
    merged,
    of_tile,
    part_of,
    share,
    union,
)
from lens_kernels.backends.triton.kernels.row_parts import (
    divergence_terms,
    given_statistics,
    label_terms,
    log_probability,
    maps_of,
    over_lanes,
    read_row,
    store_grad_stats,
    summands,
    with_group,
    write_gradient,
)
from lens_kernels.backends.triton.kernels.row_targets import (
    sparse_terms,
    standardized,
    store_at_targets,
    sum_with_logits,
)

# A thread takes 40 registers on sm_90, so six programs fit on a multiprocessor. From Triton 3.10
# on, multiplications and additions are fused only on request.
OPTIONS = {"LANES": 256, "GROUP": 8, "num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def of_lanes(value, lp, lq, KIND: tl.constexpr):
    """Return each thread's part of the relative entropy of the row."""
    between, _ = pointwise(lp, lq, 0.5, 0.5, KIND)
    return part_of(share(lp, lq, KIND), value) + between


@triton.jit
def first_sweep(
    student, teacher, statistics_ptr, offset, factor_s, floor_s, factor_t, floor_t,
    temperature, vocab_size,
    DIVERGENCE: tl.constexpr, ONLINE: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return each thread's maxima, sums of exponentials and relative entropies.

    The order is ``(maximum, total)`` of the student, then of the teacher, ``total`` of the student
    at temperature 1, forward KL, and reverse KL. Values that are not needed are zero.
    """
    zero = tl.zeros((LANES,), tl.float32)
    maximum_s, total_s, maximum_t, total_t = zero + floor_s, zero, zero + floor_t, zero
    total_1, forward, reverse = zero, zero, zero
    for start in range(0, vocab_size, LANES * GROUP):
        ys = read_row(student, offset, floor_s, start, vocab_size, LANES, GROUP, True)
        if teacher is not None and statistics_ptr is None:
            yt = read_row(teacher, offset, floor_t, start, vocab_size, LANES, GROUP, True)
        if temperature is not None:
            higher, total_1 = with_group(maximum_s, total_1, ys, factor_s * temperature)
        if ONLINE:
            max_s, sum_s, lq = conditional(ys, factor_s)
            max_t, sum_t, lp = conditional(yt, factor_t)
            maximum_s, total_s, lq_old, lq_new = union(maximum_s, total_s, max_s, sum_s, factor_s)
            maximum_t, total_t, lp_old, lp_new = union(maximum_t, total_t, max_t, sum_t, factor_t)
            if DIVERGENCE != "reverse_kl":
                part = of_tile(lp, lq, "forward_kl")
                forward = merged(forward, part, lp_old, lq_old, lp_new, lq_new, "forward_kl")
            if DIVERGENCE != "forward_kl":
                part = of_tile(lp, lq, "reverse_kl")
                reverse = merged(reverse, part, lp_old, lq_old, lp_new, lq_new, "reverse_kl")
        else:
            maximum_s, total_s = with_group(maximum_s, total_s, ys, factor_s)
            if teacher is not None and statistics_ptr is None:
                maximum_t, total_t = with_group(maximum_t, total_t, yt, factor_t)
    return maximum_s, total_s, maximum_t, total_t, total_1, forward, reverse


@triton.jit
def second_sweep(
    student, teacher, offset, floor_s, floor_t, statistics_s, statistics_t,
    vocab_size, beta, one_minus_beta,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return each thread's sums of the two results of ``summands``."""
    f = tl.zeros((LANES,), tl.float32)
    h = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab_size, LANES * GROUP):
        ys = read_row(student, offset, floor_s, start, vocab_size, LANES, GROUP, True)
        yt = read_row(teacher, offset, floor_t, start, vocab_size, LANES, GROUP, True)
        lq, lp = log_probability(ys, statistics_s), log_probability(yt, statistics_t)
        f_entry, h_entry = summands(lp, lq, beta, one_minus_beta, DIVERGENCE)
        f += tl.sum(f_entry, 1)
        h += tl.sum(h_entry, 1)
    return f, h


@triton.jit
def last_sweep(
    student, teacher, offset, floor_s, floor_t, statistics_s, statistics_t,
    h_sum, weight, label, out, grad_stats, vocab_size, beta, one_minus_beta,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, further=None,
):  # fmt: skip
    """Write a row's gradient. Return each thread's ``mass`` and ``squares`` for ``grad_stats``."""
    mass = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab_size, LANES * GROUP):
        ys = read_row(student, offset, floor_s, start, vocab_size, LANES, GROUP, False)
        yt = ys
        if DIVERGENCE is not None:
            yt = read_row(teacher, offset, floor_t, start, vocab_size, LANES, GROUP, False)
        mass, squares = write_gradient(
            ys, yt, student, statistics_s, statistics_t, h_sum, weight, label, out, grad_stats,
            mass, squares, start, vocab_size, beta, one_minus_beta,
            DIVERGENCE, LANES, GROUP, further,
        )  # fmt: skip
    return mass, squares


@triton.jit(do_not_specialize=["vocab_size"])
def row_pass_kernel(
    student, teacher, statistics_ptr, labels, weight_ptr, loss_ptr, grad_ptr, grad_stats,
    stride, grad_stride, vocab_size, beta, one_minus_beta, temperature,
    clip, targets, temperatures,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the losses of one row and, if ``grad_ptr`` is not None, the gradient of its products.

    ``student`` and ``teacher`` are ``(products, bias, slope, cap)``, and ``labels`` is ``(labels,
    weight, cross entropy)``. The cross entropy uses temperature 1. ``temperature`` is None if it is
    1, or without labels. ``grad_stats`` receives statistics of the logit gradient ``G``: each
    column's largest ``|G|``, as bits, and each row's sums of ``|G|`` and of ``G^2``. Without a
    teacher there is no divergence. ``statistics_ptr`` is None, or holds the teacher's maximum and
    log of sum. Losses above ``clip`` become ``clip``, unless it is None. ``targets`` replace the
    teacher: ``(ids, probabilities, constant, K)`` of ``TargetRows``, or None. ``temperatures`` are
    those of student and teacher if logits are standardised, and otherwise None. Both models then
    have temperature 1.
    """
    ONLINE: tl.constexpr = (
        DIVERGENCE == "forward_kl" or DIVERGENCE == "reverse_kl" or DIVERGENCE == "jeffreys"
    )
    row = tl.program_id(0).to(tl.int64)
    offset = row * stride
    further, deviation = None, None
    if temperatures is not None:
        ours, theirs = temperatures
        student, own, deviation = standardized(student, ours, offset, vocab_size, LANES, GROUP)
        if labels is not None:
            temperature = own
        if DIVERGENCE is not None:
            teacher, _, _ = standardized(teacher, theirs, offset, vocab_size, LANES, GROUP)
    factor_s, floor_s, factor_t, floor_t = maps_of(student, teacher)
    maximum_s, total_s, maximum_t, total_t, total_1, forward, reverse = first_sweep(
        student, teacher, statistics_ptr, offset, factor_s, floor_s, factor_t, floor_t,
        temperature, vocab_size, DIVERGENCE, ONLINE, LANES, GROUP,
    )  # fmt: skip
    statistics_s, lanes_q = over_lanes(maximum_s, total_s, factor_s)
    if statistics_ptr is None:
        statistics_t, lanes_p = over_lanes(maximum_t, total_t, factor_t)
    else:
        statistics_t = given_statistics(statistics_ptr, row, factor_t)

    h_sum, weight = 0.0, 0.0
    if DIVERGENCE is not None:
        if ONLINE:
            f = tl.zeros((LANES,), tl.float32)
            h = tl.zeros((LANES,), tl.float32)
            if DIVERGENCE != "reverse_kl":
                f += of_lanes(forward, lanes_p, lanes_q, "forward_kl")
            if DIVERGENCE != "forward_kl":  # for the forward KL, h is q - p, whose sum is 0
                h += of_lanes(reverse, lanes_p, lanes_q, "reverse_kl")
                f += h
        else:
            f, h = second_sweep(
                student, teacher, offset, floor_s, floor_t, statistics_s, statistics_t,
                vocab_size, beta, one_minus_beta, DIVERGENCE, LANES, GROUP,
            )  # fmt: skip
        h_sum, f_sum = tl.sum(h, 0), tl.sum(f, 0)
        h_sum, weight = divergence_terms(h_sum, f_sum, weight_ptr, loss_ptr, row, clip)
    target_sum, product = None, 0.0
    if targets is not None:
        loss, target_sum, product = sparse_terms(
            targets, student, deviation, row, offset, floor_s, statistics_s, LANES
        )
        h_sum, weight = divergence_terms(-target_sum, loss, weight_ptr, loss_ptr, row, clip)
    label = None
    if labels is not None:
        statistics = statistics_s
        if temperature is not None:
            statistics, _ = over_lanes(maximum_s, total_1, factor_s * temperature)
        label = label_terms(labels, student, row, offset, floor_s, statistics, temperature)

    if grad_ptr is not None:
        if deviation is not None:
            sums = sum_with_logits(
                student, teacher, deviation, offset, floor_s, floor_t, statistics_s, statistics_t,
                h_sum, vocab_size, beta, one_minus_beta, DIVERGENCE, LANES, GROUP,
            )  # fmt: skip
            product = (sums - product) / tl.maximum(vocab_size - 1, 1)
            weight = tl.where(deviation[2], weight, 0.0)
        if targets is not None or deviation is not None:
            further = target_sum, deviation, product
        mass, squares = last_sweep(
            student, teacher, offset, floor_s, floor_t, statistics_s, statistics_t,
            h_sum, weight, label, (grad_ptr, row, grad_stride), grad_stats,
            vocab_size, beta, one_minus_beta, DIVERGENCE, LANES, GROUP, further,
        )  # fmt: skip
        if targets is not None:
            more, more_squares = store_at_targets(
                targets, student, statistics_s, further, weight, label, grad_ptr, grad_stats,
                row, offset, row * grad_stride, floor_s, vocab_size, LANES,
            )  # fmt: skip
            mass += more
            squares += more_squares
        if grad_stats is not None:
            store_grad_stats(grad_stats, row, tl.sum(mass, 0), tl.sum(squares, 0))
