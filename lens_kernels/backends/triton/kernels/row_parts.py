"""The code that the row kernels share: reading a row, its sums, losses of labels, and gradients.

A row holds the products of a hidden state with the whole head, in fp32. Each thread reads a group
of neighbouring entries at a time, so that loads and stores take 16 bytes at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels.device_fns import FLOOR, LOG2_E, exp
from lens_kernels.backends.triton.kernels.logits import capped, factor_of, slope_at
from lens_kernels.backends.triton.kernels.pointwise import pointwise


@triton.jit
def map_of(model):
    """Return the factor that turns a result ``y`` of ``capped`` into a logit, and the least ``y``.

    The least ``y`` belongs to the logit ``FLOOR``. It replaces the ``y`` of smaller logits.
    """
    _, _, slope, cap = model
    factor = factor_of(slope, cap)
    # The interpreter of Triton 3.7 cannot divide a constexpr by a tensor.
    floor = tl.full((), FLOOR, tl.float32)
    return factor, tl.maximum(floor / factor, -1e38)


@triton.jit
def maps_of(student, teacher):
    """Return ``map_of`` of the student, then that of the teacher, or again that of the student."""
    factor_s, floor_s = map_of(student)
    factor_t, floor_t = factor_s, floor_s
    if teacher is not None:
        factor_t, floor_t = map_of(teacher)
    return factor_s, floor_s, factor_t, floor_t


@triton.jit
def entries(start, LANES: tl.constexpr, GROUP: tl.constexpr):
    """Return the index of the first entry of each thread, ``(LANES, 1)``, and all indices."""
    first = (start + tl.arange(0, LANES) * GROUP)[:, None]
    return first, first + tl.arange(0, GROUP)[None, :]


@triton.jit
def read_row(
    model, offset, floor, start, vocab_size,
    LANES: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return ``y`` of ``capped`` for a block of entries from ``start`` on, ``(LANES, GROUP)``.

    With ``MASKED``, entries beyond the vocabulary get the probability 0. Otherwise their values are
    undefined.
    """
    z_ptr, bias_ptr, slope, cap = model
    first, columns = entries(start, LANES, GROUP)
    # Rows are padded to whole groups, and masked by group: a mask over entries would split 16-byte
    # loads.
    z = tl.load(z_ptr + offset + columns, mask=first < vocab_size, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=first < vocab_size, other=0.0)
    y = capped(z, slope, cap)
    y = tl.maximum(y, floor, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(columns < vocab_size, y, 2 * floor) if MASKED else y


@triton.jit
def log_probability(y, statistics):
    """Return ``log p``. ``statistics`` are the maximum ``y``, a factor, and the log of the sum."""
    maximum, factor, log_sum = statistics
    return (y - maximum) * factor - log_sum


@triton.jit
def with_group(maximum, total, y, factor):
    """Return each thread's maximum and sum of exponentials after the group ``y``."""
    higher = tl.maximum(maximum, tl.max(y, 1))
    power = factor * LOG2_E
    total = total * tl.exp2((maximum - higher) * power)
    return higher, total + tl.sum(tl.exp2((y - higher[:, None]) * power), 1)


@triton.jit
def of_row(maximum, total, factor):
    """Return the maximum and the sum of exponentials of a row, from those of its threads."""
    highest = tl.max(maximum, 0)
    return highest, tl.sum(total * exp((maximum - highest) * factor), 0)


@triton.jit
def over_lanes(maximum, total, factor):
    """Return the ``statistics`` of a row, and the log-probability of each thread's entries."""
    highest, row_total = of_row(maximum, total, factor)
    below = (maximum - highest) * factor
    log_sum = tl.log(row_total)
    has_mass = total > 0
    log_total = tl.log(tl.where(has_mass, total, 1.0))
    lanes = tl.where(has_mass, below + (log_total - log_sum), FLOOR)
    return (highest, factor, log_sum), lanes


@triton.jit
def summands(lp, lq, beta, one_minus_beta, DIVERGENCE: tl.constexpr):
    """Return ``f``, and values whose sum over the vocabulary is that of ``h``, of entries."""
    f, h = pointwise(lp, lq, beta, one_minus_beta, DIVERGENCE)
    # q - p sums to 0. So for these divergences, the sum of h is the reverse KL, or 0.
    if DIVERGENCE == "jeffreys" or DIVERGENCE == "reverse_kl":
        h, _ = pointwise(lp, lq, beta, one_minus_beta, "reverse_kl")
    if DIVERGENCE == "forward_kl":
        h = tl.zeros(h.shape, tl.float32)
    return f, h


@triton.jit
def given_statistics(statistics_ptr, row, factor):
    """Return the ``statistics`` of a row whose maximum logit and log of sum the caller knows."""
    maximum = tl.load(statistics_ptr + 2 * row)
    highest = maximum / factor
    # Dividing the maximum by the factor rounds it, so the rounding error is added to the log of the
    # sum.
    log_sum = tl.load(statistics_ptr + 2 * row + 1) + (maximum - highest * factor)
    return highest, factor, log_sum


@triton.jit
def divergence_terms(h_sum, loss, weight_ptr, loss_ptr, row, clip):
    """Store a row's divergence. Return its sum of ``h`` and its weight, for the gradient.

    A divergence above ``clip`` becomes ``clip``, with weight 0, unless ``clip`` is None.
    """
    # With the store first, ptxas spills registers of the cluster kernel for the reverse KL.
    h_sum = tl.where(loss != loss, loss, h_sum)  # with a NaN loss, the gradient becomes NaN too
    weight = tl.load(weight_ptr + row)
    if clip is not None:
        weight = tl.where(loss > clip, 0.0, weight)
        loss = tl.where(loss > clip, clip, loss)
    tl.store(loss_ptr + row, loss)
    return h_sum, weight


@triton.jit
def label_terms(labels, student, row, offset, floor, statistics, temperature):
    """Store a row's cross entropy. Return the row's label, its weight, and ``statistics``.

    ``statistics`` belong to the student's logits at temperature 1, and are returned unchanged.
    """
    labels_ptr, label_weight_ptr, cross_entropy_ptr = labels
    label = tl.load(labels_ptr + row)
    value = cross_entropy(label, student, offset, floor, statistics, True)
    tl.store(cross_entropy_ptr + row, value)
    return label_gradient(label, label_weight_ptr + row, statistics, temperature)


@triton.jit
def cross_entropy(label, student, offset, floor, statistics, own):
    """Return the cross entropy of a label, or 0 unless the label is this rank's ``own``."""
    z_ptr, bias_ptr, slope, cap = student
    z = tl.load(z_ptr + offset + label, mask=own, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + label, mask=own, other=0.0)
    y = tl.maximum(capped(z, slope, cap), floor, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(own, -log_probability(y, statistics), 0.0)


@triton.jit
def label_gradient(label, weight_ptr, statistics, temperature):
    """Return a row's label, its weight, and ``statistics``, as ``gradient_of`` takes them."""
    weight = tl.load(weight_ptr)
    if temperature is not None:
        weight *= temperature
    return label.to(tl.int32), weight, statistics


@triton.jit
def gradient_of(
    ys, yt, student, statistics_s, statistics_t, h_sum, weight, label, first,
    beta, one_minus_beta, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a row's loss with respect to the student's products.

    ``label`` is the result of ``label_terms``, or None.
    """
    _, _, slope, cap = student
    # Without a softcap, all entries have the same slope, which then scales the row's weights.
    scale = slope if cap is None else 1.0
    lq = log_probability(ys, statistics_s)
    grad = tl.zeros(ys.shape, tl.float32)
    if DIVERGENCE is not None:
        lp = log_probability(yt, statistics_t)
        _, h = pointwise(lp, lq, beta, one_minus_beta, DIVERGENCE)
        grad = (h - exp(lq) * h_sum) * (weight * scale)
    if label is not None:
        index, label_weight, statistics = label
        lq = log_probability(ys, statistics)
        q = exp(lq)
        is_label = index - first == tl.arange(0, ys.shape[1])[None, :]
        grad += tl.where(is_label, q - 1.0, q) * (label_weight * scale)
    return grad if cap is None else grad * slope_at(ys, slope, cap)


@triton.jit
def further_gradient(y, student, statistics, further, weight):
    """Return the parts of a gradient that ``gradient_of`` lacks, except ``-t`` at targets ``t``.

    ``further`` is ``(sum t, deviation, product)``. The sum is None without targets. ``deviation``
    is that of ``standardized``, with ``product = sum_v G_v z'_v / (V - 1)``, or None.
    """
    target_sum, deviation, product = further
    _, _, slope, cap = student
    grad = tl.zeros(y.shape, tl.float32)
    if target_sum is not None:
        grad += exp(log_probability(y, statistics)) * target_sum
    if deviation is not None:
        mean, scale, _ = deviation
        grad -= (y - mean) * scale * product
    return grad * weight * slope_at(y, slope, cap)


@triton.jit
def write_gradient(
    ys, yt, student, statistics_s, statistics_t, h_sum, weight, label, out, grad_stats,
    mass, squares, start, vocab_size, beta, one_minus_beta,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, further=None,
):  # fmt: skip
    """Write the gradient of a row's entries after ``start``.

    ``out`` is ``(pointer, row, row stride)``. ``further`` is that of ``further_gradient``, or None.
    Return each lane's ``mass`` and ``squares``. With ``grad_stats``, ``|G|`` and ``G^2`` are
    added to them.
    """
    first, columns = entries(start, LANES, GROUP)
    grad = gradient_of(
        ys, yt, student, statistics_s, statistics_t, h_sum, weight, label, first,
        beta, one_minus_beta, DIVERGENCE,
    )  # fmt: skip
    if further is not None:
        grad += further_gradient(ys, student, statistics_s, further, weight)
    grad_ptr, row, stride = out
    places = grad_ptr + row * stride + columns
    tl.store(places, grad.to(grad_ptr.dtype.element_ty), mask=first < vocab_size)
    if grad_stats is not None:
        size, square = add_to_grad_stats(grad, grad_stats, first, columns, vocab_size)
        mass += size
        squares += square
    return mass, squares


@triton.jit
def add_to_grad_stats(grad, grad_stats, first, columns, vocab_size):
    """Update each column's largest ``|G|``. Return each thread's sums of ``|G|`` and ``G^2``."""
    peak_ptr, _, _ = grad_stats
    size = tl.where(columns < vocab_size, tl.abs(grad), 0.0)
    # The bits of positive floating-point numbers, read as integers, have the same order. NaN is the
    # largest.
    bits = size.to(tl.int32, bitcast=True)
    known = tl.load(peak_ptr + columns, mask=first < vocab_size, other=0)
    tl.atomic_max(peak_ptr + columns, bits, mask=bits > known, sem="relaxed")
    return tl.sum(size, 1), tl.sum(size * size, 1)


@triton.jit
def store_grad_stats(grad_stats, row, mass, squares):
    """Store a row's sums of ``|G|`` and of ``G^2``."""
    _, mass_ptr, squares_ptr = grad_stats
    tl.store(mass_ptr + row, mass)
    tl.store(squares_ptr + row, squares)
