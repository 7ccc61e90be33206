"""Turns rows of logits into losses and gradients, reading each row once.

A cluster is a group of programs on neighbouring multiprocessors, which exchange sums. Together
their registers hold a row of both models' logits. So a pair of logits moves only 10 bytes: 8 bytes
are read, and a 16-bit gradient is written. Each reduction over the cluster takes two barriers, so
one reduction serves both models.

Triton's ``num_ctas`` spreads tensors over a cluster, and from Triton 3.9 on also reductions.
``torch/clusters.py`` decides whether this kernel runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels.device_fns import LOG2_E
from lens_kernels.backends.triton.kernels.row_parts import (
    divergence_terms,
    given_statistics,
    label_terms,
    log_probability,
    maps_of,
    read_row,
    store_grad_stats,
    summands,
    write_gradient,
)


@triton.jit
def both(a, b, MAXIMUM: tl.constexpr):
    """Reduce two vectors to their maxima or sums, with one reduction over the cluster."""
    joined = tl.join(a, b)
    return tl.split(tl.max(joined, 0) if MAXIMUM else tl.sum(joined, 0))


@triton.jit
def hold_row(
    model, offset, floor, vocab_size,
    LANES: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return a row of results of ``capped`` as a tuple of blocks ``(LANES, GROUP)``."""
    held = ()
    for i in tl.static_range(BLOCKS):
        start = i * LANES * GROUP
        y = read_row(model, offset, floor, start, vocab_size, LANES, GROUP, True)
        held += (y,)  # type: ignore[assignment]
    return held


@triton.jit
def lane_maximum(held):
    """Return the maximum of each lane, ``(LANES,)``."""
    maximum = tl.max(held[0], 1)
    for i in tl.static_range(1, len(held)):
        maximum = tl.maximum(maximum, tl.max(held[i], 1))
    return maximum


@triton.jit
def lane_total(held, maximum, factor):
    """Return each lane's sum of ``exp(factor * (y - maximum))``, ``(LANES,)``."""
    power = factor * LOG2_E
    total = tl.sum(tl.exp2((held[0] - maximum) * power), 1)
    for i in tl.static_range(1, len(held)):
        total += tl.sum(tl.exp2((held[i] - maximum) * power), 1)
    return total


@triton.jit(do_not_specialize=["vocab_size"])
def cluster_pass_kernel(
    student, teacher, statistics_ptr, labels, weight_ptr, loss_ptr, grad_ptr, grad_stats,
    stride, grad_stride, vocab_size, beta, one_minus_beta, temperature,
    clip,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the losses and gradients of a row, from the arguments of ``row_pass_kernel``.

    There are no sparse targets, and logits are not standardised.

    The row has at most ``BLOCKS * LANES * GROUP`` entries. ``LANES`` counts the threads of the
    whole cluster.
    """
    row = tl.program_id(0).to(tl.int64)
    offset = row * stride
    factor_s, floor_s, factor_t, floor_t = maps_of(student, teacher)
    held_s = hold_row(student, offset, floor_s, vocab_size, LANES, GROUP, BLOCKS)
    held_t = held_s
    if DIVERGENCE is not None:
        held_t = hold_row(teacher, offset, floor_t, vocab_size, LANES, GROUP, BLOCKS)

    max_s, max_t = both(lane_maximum(held_s), lane_maximum(held_t), True)
    total_s, total_t = both(
        lane_total(held_s, max_s, factor_s), lane_total(held_t, max_t, factor_t), False
    )
    statistics_s = max_s, factor_s, tl.log(total_s)
    statistics_t = max_t, factor_t, tl.log(total_t)
    if statistics_ptr is not None:
        statistics_t = given_statistics(statistics_ptr, row, factor_t)

    h_sum, weight = 0.0, 0.0
    if DIVERGENCE is not None:
        f = tl.zeros((LANES,), tl.float32)
        h = tl.zeros((LANES,), tl.float32)
        for i in tl.static_range(BLOCKS):
            lq = log_probability(held_s[i], statistics_s)
            lp = log_probability(held_t[i], statistics_t)
            f_entry, h_entry = summands(lp, lq, beta, one_minus_beta, DIVERGENCE)
            f += tl.sum(f_entry, 1)
            h += tl.sum(h_entry, 1)
        loss, h_sum = both(f, h, False)
        h_sum, weight = divergence_terms(h_sum, loss, weight_ptr, loss_ptr, row, clip)
    label = None
    if labels is not None:
        statistics = statistics_s
        if temperature is not None:
            factor = factor_s * temperature
            total = tl.sum(lane_total(held_s, max_s, factor), 0)
            statistics = max_s, factor, tl.log(total)
        label = label_terms(labels, student, row, offset, floor_s, statistics, temperature)

    if grad_ptr is not None:
        mass = tl.zeros((LANES,), tl.float32)
        squares = tl.zeros((LANES,), tl.float32)
        for i in tl.static_range(BLOCKS):
            mass, squares = write_gradient(
                held_s[i], held_t[i], student, statistics_s, statistics_t, h_sum, weight, label,
                (grad_ptr, row, grad_stride), grad_stats, mass, squares, i * LANES * GROUP,
                vocab_size, beta, one_minus_beta, DIVERGENCE, LANES, GROUP,
            )  # fmt: skip
        if grad_stats is not None:
            mass_sum, squares_sum = both(mass, squares, False)
            store_grad_stats(grad_stats, row, mass_sum, squares_sum)
