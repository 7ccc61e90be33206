"""The table of ``lens_kernels/divergence.py`` on the device: each divergence as a pair ``(f, h)``.

The parity grid of the tests holds the two tables together.
"""

import triton
import triton.language as tl

from lens_kernels.backends.triton.device_fns import exp, log_mixture, minus


@triton.jit
def pointwise(lp, lq, beta, DIVERGENCE: tl.constexpr):
    """Return ``(f, h)`` from the log-probabilities of teacher and student."""
    d = lp - lq
    if DIVERGENCE == "hellinger":
        root_q = exp(lq * 0.5)
        diff = minus(exp(lp * 0.5), root_q, d * 0.5)
        f = diff * diff * 0.5
        h = -root_q * diff * 0.5
    elif DIVERGENCE == "jsd":
        # Where p / q leaves this range, the smaller of the two adds nothing.
        d = tl.maximum(d, -80.0, propagate_nan=tl.PropagateNan.ALL)
        d = tl.minimum(d, 80.0, propagate_nan=tl.PropagateNan.ALL)
        # log(m / q) and log(m / p): one as the other less d would lose the digits of a large d.
        h = (beta - 1.0) * exp(lq) * log_mixture(d, beta)
        f = h - beta * exp(lp) * log_mixture(-d, 1.0 - beta)
    else:
        p = exp(lp)
        q = exp(lq)
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
