"""Elementary functions of the kernels, accurate where the ones built in lose their digits.

Triton has ``expm1``, ``log1p`` and ``tanh`` only in vendors' device libraries, which its
interpreter lacks.
"""

import triton
import triton.language as tl

# Stands for -inf logits, whose differences would be NaN.
FLOOR = tl.constexpr(-1e30)
# |d| below which differences of p and q go through a series.
NEAR = tl.constexpr(0.5)


@triton.jit
def expm1_near(x):
    """``exp(x) - 1`` for ``|x| <= NEAR``: the Taylor series, its rest below 1e-8."""
    y = x * (1 / 40320) + (1 / 5040)
    y = y * x + (1 / 720)
    y = y * x + (1 / 120)
    y = y * x + (1 / 24)
    y = y * x + (1 / 6)
    y = y * x + 0.5
    return x + x * x * y


@triton.jit
def expm1(x):
    """``exp(x) - 1``."""
    return tl.where(tl.abs(x) < NEAR, expm1_near(x), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for ``x`` in ``(-1, 0]``.

    Near 0 by the polynomial that equals ``log1p(x) / x`` at the Chebyshev points of [-1/4, 0]; its
    largest relative error there is 3e-9.
    """
    y = x * 0.33257493 - 0.09051561
    y = y * x + 0.21397438
    y = y * x - 0.24872594
    y = y * x + 0.33338768
    y = y * x - 0.49999914
    return tl.where(x > -0.25, x + x * x * y, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """``tanh(x)``, accurate relative to itself."""
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def minus(p, q, d):
    """``p - q`` for ``p = q exp(d)``, without cancellation near the diagonal."""
    return tl.where(tl.abs(d) < NEAR, q * expm1_near(d), p - q)
