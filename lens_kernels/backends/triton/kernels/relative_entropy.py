"""Relative entropies (KL) over parts of the vocabulary, and how to merge them.

The chain rule of relative entropy, for a vocabulary in several parts::

    KL(p, q) = sum_parts P KL(p | part, q | part) + KL(P, Q)

``P`` and ``Q`` are the probabilities of the parts. So the results of two parts can be merged into
the result of their union. Every term is as accurate as the pointwise formulas, and each logit is
needed only once.
"""

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels.device_fns import FLOOR, exp
from lens_kernels.backends.triton.kernels.pointwise import pointwise


@triton.jit
def conditional(y, factor):
    """Return each row's ``(maximum, total, log-probabilities)``, as if no other tile existed.

    Logits are ``factor * y``. ``maximum`` is the maximum of ``y``, and ``total`` the sum of
    exponentials.
    """
    maximum = tl.max(y, 1)
    u = (y - maximum[:, None]) * factor
    total = tl.sum(exp(u), 1)
    return maximum, total, u - tl.log(total)[:, None]


@triton.jit
def union(maximum, total, other_maximum, other_total, factor):
    """Return the maximum and total of two parts, and each part's log-probability in their union."""
    higher = tl.maximum(maximum, other_maximum)
    here = (maximum - higher) * factor
    there = (other_maximum - higher) * factor
    both = total * exp(here) + other_total * exp(there)
    log_sum = tl.log(tl.where(both > 0, both, 1.0))
    # A part whose probability is 0 has the log-probability FLOOR instead of -inf.
    has_mass = total > 0
    here = tl.where(has_mass, here + tl.log(tl.where(has_mass, total, 1.0)) - log_sum, FLOOR)
    return higher, both, here, there + tl.log(other_total) - log_sum


@triton.jit
def part_of(log_share, value):
    """Return ``exp(log_share) * value``. It is 0, not NaN, for 0 times infinity."""
    share = exp(log_share)
    return tl.where((share == 0) & (value == float("inf")), 0.0, share * value)


@triton.jit
def share(lp, lq, KIND: tl.constexpr):
    """Return a part's log-probability in the first model of the KL."""
    return lp if KIND == "forward_kl" else lq


@triton.jit
def of_tile(lp, lq, KIND: tl.constexpr):
    """Return each row's relative entropy within a tile, from results of ``conditional``."""
    f, _ = pointwise(lp, lq, 0.5, 0.5, KIND)
    return tl.sum(f, 1)


@triton.jit
def merged(value, part, lp_old, lq_old, lp_new, lq_new, KIND: tl.constexpr):
    """Merge the relative entropy ``value`` of the old part with ``part``, that of a new tile.

    ``lp_*`` and ``lq_*`` are the log-probabilities of the old part and the new tile in their union.
    """
    old, _ = pointwise(lp_old, lq_old, 0.5, 0.5, KIND)
    new, _ = pointwise(lp_new, lq_new, 0.5, 0.5, KIND)
    value = part_of(share(lp_old, lq_old, KIND), value)
    return value + part_of(share(lp_new, lq_new, KIND), part) + old + new
