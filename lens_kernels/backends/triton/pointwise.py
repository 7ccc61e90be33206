"""The table of ``lens_kernels/divergence.py`` on the device: each divergence as a pair ``(f, h)``.

The parity grid of the tests holds the two tables together.
"""

import triton
import triton.language as tl

from lens_kernels.backends.triton.device_fns import expm1, log1p, minus


@triton.jit
def pointwise(lp, lq, beta, DIVERGENCE: tl.constexpr):
    """Return ``(f, h)`` from the log-probabilities of teacher and student."""
    d = lp - lq
    if DIVERGENCE == "hellinger":
        root_q = tl.exp(lq * 0.5)
        diff = minus(tl.exp(lp * 0.5), root_q, d * 0.5)
        f = diff * diff * 0.5
        h = -root_q * diff * 0.5
        return f, h
    p = tl.exp(lp)
    q = tl.exp(lq)
    if DIVERGENCE == "jsd":
        k = tl.where(d > 0, 1.0 - beta, beta)
        l = log1p(k * expm1(-tl.abs(d)))  # noqa: E741
        student = (1.0 - beta) * q * (tl.where(d > 0, d, 0.0) + l)
        f = beta * p * (tl.where(d > 0, 0.0, d) - l) - student
        return f, -student
    diff = minus(p, q, d)
    if DIVERGENCE == "jeffreys":
        f = diff * d
        h = -diff - q * d
    elif DIVERGENCE == "forward_kl":
        f = p * d - diff
        h = -diff
    elif DIVERGENCE == "reverse_kl":
        f = diff - q * d
        h = -q * d
    else:
        tl.static_assert(DIVERGENCE == "tvd")
        f = tl.abs(diff) * 0.5
        h = -q * tl.where(diff > 0, 0.5, tl.where(diff < 0, -0.5, 0.0))
    return f, h
