"""The divergences in Triton. Each is a pair ``(f, h)``, as in ``lens_kernels/divergence.py``.

``divergence.py`` derives the formulas. For ``jsd``, with the mixture ``m = beta p + (1 - beta) q``
and ``d = log p - log q``::

    log(m / q) = log(1 - beta + beta exp(d)),   log(m / p) = log(beta + (1 - beta) exp(-d))
    h = -(1 - beta) q log(m / q),               f = h - beta p log(m / p)

At beta 1/2, called ``jsd_half``, one logarithm is enough. With ``c = -log cosh(d / 2)``::

    log(m / q) = d / 2 - c,   log(m / p) = -d / 2 - c,   f = (p + q) (d / 2 tanh(d / 2) + c) / 2

Callers compute ``1 - beta`` in float64, because in fp32 it loses its digits for ``beta`` near 1.
"""

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels.device_fns import (
    LN_2,
    NEAR,
    NO_MASS,
    exp,
    log1p_far,
    log_cosh_near,
    log_mixture,
    minus,
    symmetric_near,
)
from lens_kernels.options import Divergence


def name_of(divergence: Divergence | None, beta: float) -> str | None:
    """Return the name that ``pointwise`` has for a divergence, or None without a divergence."""
    if divergence is Divergence.JSD and beta == 0.5:
        return "jsd_half"
    return None if divergence is None else divergence.value


@triton.jit
def or_infinity(value, mass, log_ratio):
    """Return ``value``, or ``inf`` where ``mass`` is positive and the other probability is zero."""
    return tl.where((log_ratio > NO_MASS) & (mass > 0), float("inf"), value)


@triton.jit
def pointwise(lp, lq, beta, one_minus_beta, DIVERGENCE: tl.constexpr):
    """Return ``(f, h)`` from the log-probabilities of teacher and student."""
    d = lp - lq
    if DIVERGENCE == "hellinger":
        root_q = exp(lq * 0.5)
        diff = minus(exp(lp * 0.5), root_q, d * 0.5)
        f = diff * diff * 0.5
        h = -root_q * diff * 0.5
    elif DIVERGENCE == "jsd_half":
        p = exp(lp)
        q = exp(lq)
        size = tl.abs(d)
        square = d * d
        near = size < NEAR
        rest = LN_2 - log1p_far(exp(-size))
        log_ratio = tl.where(near, -log_cosh_near(square) - d * 0.5, rest - tl.maximum(d, 0.0))
        far = p * (rest + tl.minimum(d, 0.0)) + q * log_ratio
        f = 0.5 * tl.where(near, (p + q) * symmetric_near(square), far)
        h = 0.5 * (q * log_ratio)
    elif DIVERGENCE == "jsd":
        # If |d| is so large, the smaller of p and q does not change the result.
        d = tl.maximum(d, -80.0, propagate_nan=tl.PropagateNan.ALL)
        d = tl.minimum(d, 80.0, propagate_nan=tl.PropagateNan.ALL)
        # ``log(m / q) - d`` equals log(m / p) too, but loses digits for large d.
        h = -one_minus_beta * exp(lq) * log_mixture(d, beta, one_minus_beta)
        f = h - beta * exp(lp) * log_mixture(-d, one_minus_beta, beta)
    else:
        p = exp(lp)
        q = exp(lq)
        diff = minus(p, q, d)
        if DIVERGENCE == "jeffreys":
            f = or_infinity(or_infinity(diff * d, p, d), q, -d)
            h = or_infinity(-diff - q * d, q, -d)
        elif DIVERGENCE == "forward_kl":
            f = or_infinity(p * d - diff, p, d)
            h = -diff
        elif DIVERGENCE == "reverse_kl":
            f = or_infinity(diff - q * d, q, -d)
            h = or_infinity(-q * d, q, -d)
        else:
            tl.static_assert(DIVERGENCE == "tvd")
            f = tl.abs(diff) * 0.5
            h = -q * tl.where(diff > 0, 0.5, tl.where(diff < 0, -0.5, 0.0))
    return f, h
