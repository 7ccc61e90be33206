"""Relative entropies of parts of the vocabulary, merged into those of their union.

By the chain rule of relative entropy, for a vocabulary that is split into parts::

    KL(p, q) = sum_parts P KL(p | part, q | part) + KL(P, Q)

where ``P`` and ``Q`` are the probabilities of the parts. Results of two parts merge into those of
their union, as running variances do. Every term keeps the relative accuracy of the pointwise
formulas, and each logit is needed once.
"""

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels.device_fns import FLOOR, exp
from lens_kernels.backends.triton.kernels.pointwise import pointwise


@triton.jit
def conditional(y, factor):
    """Return ``(maximum, total, log-probabilities)`` of the rows of a tile by themselves.

    ``factor y`` are logits; maxima are those of ``y``.
    """
    maximum = tl.max(y, 1)
    u = (y - maximum[:, None]) * factor
    total = tl.sum(exp(u), 1)
    return maximum, total, u - tl.log(total)[:, None]


@triton.jit
def union(maximum, total, other_maximum, other_total, factor):
    """Return maximum and total of the union of two parts, and the log-probability of each part."""
    higher = tl.maximum(maximum, other_maximum)
    here = (maximum - higher) * factor
    there = (other_maximum - higher) * factor
    both = total * exp(here) + other_total * exp(there)
    log_sum = tl.log(tl.where(both > 0, both, 1.0))
    # The log-probability of an empty part is FLOOR, not -inf.
    has_mass = total > 0
    here = tl.where(has_mass, here + tl.log(tl.where(has_mass, total, 1.0)) - log_sum, FLOOR)
    return higher, both, here, there + tl.log(other_total) - log_sum


@triton.jit
def part_of(log_share, value):
    """``exp(log_share) value``, and 0 for an infinite value of a part without mass."""
    share = exp(log_share)
    return tl.where((share == 0) & (value == float("inf")), 0.0, share * value)


@triton.jit
def share(lp, lq, KIND: tl.constexpr):
    """Return the log-probability by which relative entropies of parts are weighted."""
    return lp if KIND == "forward_kl" else lq


@triton.jit
def of_tile(lp, lq, KIND: tl.constexpr):
    """Return the relative entropy of each row of a tile from its own log-probabilities."""
    f, _ = pointwise(lp, lq, 0.5, 0.5, KIND)
    return tl.sum(f, 1)


@triton.jit
def merged(value, part, lp_old, lq_old, lp_new, lq_new, KIND: tl.constexpr):
    """Return the relative entropy of the union of parts with ``value`` and a tile with ``part``.

    The log-probabilities are those of both parts in the union.
    """
    old, _ = pointwise(lp_old, lq_old, 0.5, 0.5, KIND)
    new, _ = pointwise(lp_new, lq_new, 0.5, 0.5, KIND)
    value = part_of(share(lp_old, lq_old, KIND), value)
    return value + part_of(share(lp_new, lq_new, KIND), part) + old + new
