"""Elementary functions of the kernels. Stated errors are relative, and leave out rounding.

Triton has ``expm1``, ``log1p`` and ``tanh`` only in vendors' device libraries, which its
interpreter lacks. On sm_90, its ``exp`` and ``log`` take 5 and 26 instructions, but those here take
2 and 17. Apart from the GEMMs, a sweep spends most of its time in these functions. Their
polynomials interpolate at Chebyshev points.
"""

import triton
import triton.language as tl

from lens_kernels import divergence

# The number that replaces logits of -inf, because a difference of infinities is NaN.
FLOOR = tl.constexpr(divergence.FLOOR)
NO_MASS = tl.constexpr(divergence.NO_MASS)
# For |d| = |log p - log q| up to NEAR, p - q is computed by a series.
NEAR = tl.constexpr(0.5)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ROOT_HALF_BITS = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2) in fp32, as an integer


@triton.jit
def exp(x):
    """``exp(x)``."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def expm1_near(x):
    """``exp(x) - 1`` for ``|x| <= NEAR``, with an error of 2e-8."""
    y = x * 1.9944874e-4 + 1.3982186e-3
    y = y * x + 8.333236e-3
    y = y * x + 4.1665792e-2
    y = y * x + 1.6666667e-1
    y = y * x + 0.5
    return x + x * x * y


@triton.jit
def log_sum(total, x):
    """``log(total)`` for ``total = 1 + x > 0``, with relative error 6e-8 for exact arguments.

    ``total`` is ``2^e`` times a number between sqrt(1/2) and sqrt(2). Where ``e`` is 0, the
    function uses ``x``, which has more digits than ``total - 1``.
    """
    bits = total.to(tl.int32, bitcast=True)
    e = (bits - ROOT_HALF_BITS) >> 23
    factor = (bits - (e << 23)).to(tl.float32, bitcast=True)
    x = tl.where(e == 0, x, factor - 1.0)
    y = x * 0.08787265 - 0.14159647
    y = y * x + 0.14834787
    y = y * x - 0.16588488
    y = y * x + 0.1997205
    y = y * x - 0.25001147
    y = y * x + 0.33333671
    y = y * x - 0.49999997
    return e.to(tl.float32) * LN_2 + (x + x * x * y)


@triton.jit
def log_mixture(d, beta, one_minus_beta):
    """``log(1 - beta + beta exp(d))``.

    Near ``d = 0`` this uses a series. Its coefficients are the cumulants of a Bernoulli variable
    with probability ``beta``, divided by factorials. The remainder is below 3e-8 of the sum. For
    other ``d``, ``log_sum`` is accurate, because its terms are positive and ``exp(d)`` is not near
    1.
    """
    v = beta * one_minus_beta
    s = one_minus_beta - beta
    y = d * (v * (1.0 - v * (126.0 - v * (1680.0 - v * 5040.0))) * (1 / 40320))
    y = (y + v * s * (1.0 - v * (60.0 - v * 360.0)) * (1 / 5040)) * d
    y = (y + v * (1.0 - v * (30.0 - v * 120.0)) * (1 / 720)) * d
    y = (y + v * s * (1.0 - v * 12.0) * (1 / 120)) * d
    y = (y + v * (1.0 - v * 6.0) * (1 / 24)) * d
    y = (y + v * s * (1 / 6)) * d
    y = (y + v * 0.5) * d
    y = (y + beta) * d
    scaled = beta * exp(d)
    far = log_sum(one_minus_beta + scaled, scaled - beta)
    return tl.where(tl.abs(d) < NEAR, y, far)


@triton.jit
def log1p_far(e):
    """``log(1 + e)`` for ``0 <= e <= exp(-NEAR)``, with an error of 2e-8."""
    y = e * 0.02535015 - 0.09082444
    y = y * e + 0.16923109
    y = y * e - 0.24253859
    y = y * e + 0.33232507
    y = y * e - 0.49993402
    y = y * e + 0.99999851
    return y * e


@triton.jit
def log_cosh_near(square):
    """``log(cosh(d / 2))`` from ``square = d^2`` for ``|d| <= NEAR``, with an error of 2e-7."""
    y = square * 3.3756855e-4 - 5.2074352e-3
    return square * (y * square + 0.12499999)


@triton.jit
def symmetric_near(square):
    """``d/2 tanh(d/2) - log(cosh(d/2))`` from ``square = d^2``, ``|d| <= NEAR``; error 2e-8."""
    y = square * -1.7517901e-4 + 1.7346757e-3
    y = y * square - 1.5624928e-2
    return square * (y * square + 0.125)


@triton.jit
def tanh(x):
    """``tanh(x)``, by a polynomial accurate to 6e-8 for ``|x| < 1/2``, else by exponentials."""
    # The square of a reciprocal square root takes three instructions. A division takes nine.
    root = tl.rsqrt(exp(2.0 * tl.abs(x)) + 1.0)
    far = 1.0 - 2.0 * root * root
    far = tl.where(x < 0, -far, far)
    square = x * x
    y = square * 0.01798873 - 0.05338711
    y = y * square + 0.13330476
    y = y * square - 0.3333331
    return tl.where(square < 0.25, x + x * square * y, far)


@triton.jit
def minus(p, q, d):
    """Return ``p - q`` from ``p``, ``q`` and ``d = log(p / q)``.

    The result keeps its digits where ``p`` and ``q`` are nearly equal.
    """
    return tl.where(tl.abs(d) < NEAR, q * expm1_near(d), p - q)
