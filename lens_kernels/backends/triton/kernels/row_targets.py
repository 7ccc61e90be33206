"""The parts of the row kernel for standardised logits and for sparse targets.

The softmax does not depend on the mean of its logits. So standardised logits are logits with a
temperature of the row's own, ``T s``, and only their gradient has one more term. The formulas are
in ``standardized.py`` and ``targets.py`` of the ``torch`` backend.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels.device_fns import exp
from lens_kernels.backends.triton.kernels.logits import capped, slope_at
from lens_kernels.backends.triton.kernels.pointwise import pointwise
from lens_kernels.backends.triton.kernels.row_parts import (
    add_to_grad_stats,
    entries,
    further_gradient,
    gradient_of,
    log_probability,
    map_of,
    read_row,
)


@triton.jit
def standardized(
    model, temperature, offset, vocab_size, LANES: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Return a model at temperature ``T s``, this temperature, and ``deviation``.

    ``deviation`` is ``(mean, scale, varies)``, with ``z' = (y - mean) * scale`` for ``y`` from
    ``capped``. If all logits are equal, ``varies`` is False and the temperature is 1.
    """
    z_ptr, bias_ptr, slope, cap = model
    factor, floor = map_of(model)
    count = tl.zeros((LANES,), tl.float32)
    mean = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((LANES,), tl.float32)
    lowest = tl.full((LANES,), float("inf"), tl.float32)
    highest = -lowest
    # Each lane merges the mean and the squared deviations of its groups. A sum of squares of the
    # logits themselves would lose digits where their mean is large.
    for start in range(0, vocab_size, LANES * GROUP):
        _, columns = entries(start, LANES, GROUP)
        y = read_row(model, offset, floor, start, vocab_size, LANES, GROUP, False)
        valid = columns < vocab_size
        number = tl.sum(valid.to(tl.float32), 1)
        group_mean = tl.sum(tl.where(valid, y, 0.0), 1) / tl.maximum(number, 1.0)
        inside = tl.where(valid, y - group_mean[:, None], 0.0)
        shift = group_mean - mean
        share = number / tl.maximum(count + number, 1.0)
        squares += tl.sum(inside * inside, 1) + shift * shift * count * share
        mean += shift * share
        count += number
        lowest = tl.minimum(lowest, tl.min(tl.where(valid, y, float("inf")), 1))
        highest = tl.maximum(highest, tl.max(tl.where(valid, y, float("-inf")), 1))
    centre = tl.sum(mean * count, 0) / vocab_size
    shift = mean - centre
    total = tl.sum(squares + shift * shift * count, 0)
    spread = factor * tl.sqrt(total / tl.maximum(vocab_size - 1, 1))
    # The mean of equal logits is rounded, so ``spread`` may be above 0.
    varies = (tl.max(highest, 0) > tl.min(lowest, 0)) & (spread > 0)
    own = tl.where(varies, spread * temperature, 1.0)
    if cap is not None:
        cap = cap / own
    deviation = centre, factor / own * temperature, varies
    return (z_ptr, bias_ptr, slope / own, cap), own, deviation


@triton.jit
def sum_with_logits(
    student, teacher, deviation, offset, floor_s, floor_t, statistics_s, statistics_t, h_sum,
    vocab_size, beta, one_minus_beta,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return ``sum_v (h_v - q_v h_sum) z'_v``. Without a teacher, ``h`` is 0."""
    mean, scale = deviation[0], deviation[1]
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab_size, LANES * GROUP):
        columns = entries(start, LANES, GROUP)[1]
        y = read_row(student, offset, floor_s, start, vocab_size, LANES, GROUP, True)
        lq = log_probability(y, statistics_s)
        grad = -exp(lq) * h_sum
        if DIVERGENCE is not None:
            yt = read_row(teacher, offset, floor_t, start, vocab_size, LANES, GROUP, True)
            _, h = pointwise(
                log_probability(yt, statistics_t), lq, beta, one_minus_beta, DIVERGENCE
            )
            grad += h
        total += tl.sum(tl.where(columns < vocab_size, grad * (y - mean) * scale, 0.0), 1)
    return tl.sum(total, 0)


@triton.jit
def listed(targets, student, row, offset, floor, start, LANES: tl.constexpr):
    """Return ids, probabilities and ``y`` of a row's targets after ``start``, ``(LANES, 1)``."""
    ids_ptr, values_ptr, _, count = targets
    z_ptr, bias_ptr, slope, cap = student
    k = start + tl.arange(0, LANES)[:, None]
    at = row * count + k
    ids = tl.load(ids_ptr + at, mask=k < count, other=0)
    value = tl.load(values_ptr + at, mask=k < count, other=0.0)
    z = tl.load(z_ptr + offset + ids)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + ids)
    y = tl.maximum(capped(z, slope, cap), floor, propagate_nan=tl.PropagateNan.ALL)
    return ids.to(tl.int32), value, y


@triton.jit
def sparse_terms(
    targets, student, deviation, row, offset, floor, statistics, LANES: tl.constexpr
):  # fmt: skip
    """Return a row's divergence from its targets ``t``, and the sums of ``t`` and of ``t z'``."""
    constant_ptr, count = targets[2], targets[3]
    loss = tl.zeros((LANES,), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    product = tl.zeros((LANES,), tl.float32)
    for start in range(0, count, LANES):
        _, value, y = listed(targets, student, row, offset, floor, start, LANES)
        loss -= tl.sum(value * log_probability(y, statistics), 1)
        total += tl.sum(value, 1)
        if deviation is not None:
            product += tl.sum(value * (y - deviation[0]) * deviation[1], 1)
    loss = tl.load(constant_ptr + row) + tl.sum(loss, 0)
    return loss, tl.sum(total, 0), tl.sum(product, 0)


@triton.jit
def store_at_targets(
    targets, student, statistics, further, weight, label,
    grad_ptr, grad_stats, row, offset, grad_offset, floor, vocab_size, LANES: tl.constexpr,
):  # fmt: skip
    """Write the whole gradient at a row's targets. Return changes of ``grad_stats``' two sums.

    These entries are computed again in fp32, because those in memory are rounded.
    """
    slope, cap = student[2], student[3]
    mass = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((LANES,), tl.float32)
    tl.debug_barrier()  # other threads may have written these entries
    for start in range(0, targets[3], LANES):
        ids, value, y = listed(targets, student, row, offset, floor, start, LANES)
        dense = gradient_of(
            y, y, student, statistics, statistics, 0.0, 0.0, label, ids, 0.5, 0.5, None
        )
        dense += further_gradient(y, student, statistics, further, weight)
        grad = dense - value * weight * slope_at(y, slope, cap)
        # A probability of 0 marks padding, and repeated ids.
        is_target = value != 0
        tl.store(grad_ptr + grad_offset + ids, grad.to(grad_ptr.dtype.element_ty), mask=is_target)
        if grad_stats is not None:
            column = tl.where(is_target, ids, vocab_size)
            size, square = add_to_grad_stats(grad, grad_stats, column, column, vocab_size)
            before = tl.where(is_target, tl.abs(dense), 0.0)
            mass += size - tl.sum(before, 1)
            squares += square - tl.sum(before * before, 1)
    return mass, squares
