"""The divergences. Each is a pair of functions ``(f, h)`` of a vocabulary entry's probabilities.

The teacher's probability is ``p``, the student's ``q``. The sum of ``f`` over the vocabulary is the
divergence. ``h`` gives its gradient with respect to the student's logits: ``G = h - q * sum(h)``.
Adding a multiple of ``p - q`` to ``f`` does not change the sum, and adding a multiple of ``q`` to
``h`` does not change ``G``. The multiples are chosen so that ``f`` and ``h`` are exactly 0 where
``p == q``, and accurate nearby.

A KL divergence is infinite if its second distribution is 0 where its first is positive. So
``forward_kl`` and ``jeffreys`` are infinite where only ``q`` is 0, and ``reverse_kl`` and
``jeffreys`` where only ``p`` is 0. There ``f`` is ``inf``, and so is ``h`` if it contains the
infinite logarithm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lens_kernels.options import Divergence

Pointwise = tuple[Tensor, Tensor]
# The weights ``(beta, 1 - beta)`` of teacher and student in the mixture of jsd. Callers compute
# both in float64, because 1 - beta loses its digits in float32 for beta near 1.
Mixture = tuple[float | Tensor, float | Tensor]
# Computes a divergence's (f, h) from log p, log q, p, q and the weights of the mixture.
Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Mixture], Pointwise]
# For |log p - log q| up to NEAR, p - q is computed by expm1.
NEAR = 0.5
# The number that replaces logits of -inf, because a difference of infinities is NaN.
FLOOR = -1e30
# The largest log-ratio of two positive probabilities. Above it, the smaller probability is 0.
NO_MASS = -FLOOR / 2


def _expm1(x: Tensor) -> Tensor:
    """Return ``exp(x) - 1`` for ``|x| <= NEAR``."""
    if not torch.compiler.is_compiling():
        return torch.expm1(x)
    # The Inductor of torch 2.13 computes expm1(x) as exp(x) - 1 on CPUs, which loses digits near 0.
    # The Taylor series is accurate to the rounding of the dtype.
    total = torch.ones_like(x)
    for n in range(15 if x.dtype is torch.float64 else 8, 1, -1):
        # Multiply by 1 / n, because Inductor would generate a slow division for ``x / n``.
        total = 1 + x * (1 / n) * total
    return x * total


def _minus(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Return ``p - q``, where ``d = log p - log q``.

    Where p and q are nearly equal, the result is ``q expm1(d)``.
    """
    near = d.clamp(-NEAR, NEAR)
    return torch.where(near == d, q * _expm1(near), p - q)


def _or_infinity(value: Tensor, mass: Tensor, log_ratio: Tensor) -> Tensor:
    """Return ``value``, or ``inf`` where ``mass`` is positive and the other probability is zero."""
    return torch.where((log_ratio > NO_MASS) & (mass > 0), torch.inf, value)


def _log_mixture(d: Tensor, p: Tensor, q: Tensor, beta: Mixture) -> Tensor:
    """Return ``log(m / q)`` for the mixture ``m = beta p + (1 - beta) q``.

    ``m / q`` equals ``beta p / q + (1 - beta)``, and, with ``d = log p - log q``, also ``1 + beta
    expm1(d)``. The first form is accurate where ``m / q`` is far from 1, and the second where it is
    near 1. W. Kahan's identity ``log(1 + x) = log(u) x / (u - 1)`` joins both. It holds for any
    ``u`` near ``1 + x``.
    """
    # Where q is 0, the result does not matter, because callers multiply it by q.
    ratio = p / q.clamp(min=torch.finfo(q.dtype).tiny)
    near = d.clamp(-NEAR, NEAR)
    x = beta[0] * torch.where(near == d, _expm1(near), ratio - 1)
    u = beta[0] * ratio + beta[1]
    return torch.where(u == 1, x, u.log() * (x / torch.where(u == 1, 1.0, u - 1)))


def _jsd(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Mixture) -> Pointwise:
    d = lp - lq
    student = beta[1] * q * _log_mixture(d, p, q, beta)
    teacher = beta[0] * p * _log_mixture(-d, q, p, (beta[1], beta[0]))
    return -teacher - student, -student


def _jsd_half(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Mixture) -> Pointwise:
    """Return the jsd for beta 1/2, which needs only one logarithm.

    Let ``m = (p + q) / 2``, ``d = log p - log q`` and ``l = log1p(expm1(-|d|) / 2)``. Then ``log(m
    / q) = max(d, 0) + l`` and ``log(m / p) = max(-d, 0) + l``. Both sums keep their digits.
    """
    d = lp - lq
    # ``far`` equals expm1(-|d|) without an exponential. Where p and q are 0, the result is 0 for
    # any l.
    larger = torch.maximum(p, q).clamp(min=torch.finfo(p.dtype).tiny)
    far = torch.minimum(p, q) / larger - 1
    near = -d.abs().clamp(max=NEAR)
    l = torch.log1p(torch.where(near > -NEAR, _expm1(near), far) / 2)  # noqa: E741
    student = q * (d.clamp(min=0) + l) / 2
    return p * (d.clamp(max=0) - l) / 2 - student, -student


def _jeffreys(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Mixture) -> Pointwise:
    d = lp - lq
    diff = _minus(p, q, d)
    f = _or_infinity(_or_infinity(diff * d, p, d), q, -d)
    return f, _or_infinity(-diff - q * d, q, -d)


def _forward_kl(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Mixture) -> Pointwise:
    d = lp - lq
    diff = _minus(p, q, d)
    return _or_infinity(p * d - diff, p, d), -diff


def _reverse_kl(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Mixture) -> Pointwise:
    d = lp - lq
    return _or_infinity(_minus(p, q, d) - q * d, q, -d), _or_infinity(-q * d, q, -d)


def _tvd(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Mixture) -> Pointwise:
    diff = _minus(p, q, lp - lq)
    return diff.abs() / 2, -q * diff.sign() / 2


def _hellinger(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Mixture) -> Pointwise:
    root_q = q.sqrt()
    diff = _minus(p.sqrt(), root_q, (lp - lq) / 2)
    return diff * diff / 2, -root_q * diff / 2


_TABLE: dict[Divergence, Formula] = {
    Divergence.JSD: _jsd,
    Divergence.JEFFREYS: _jeffreys,
    Divergence.FORWARD_KL: _forward_kl,
    Divergence.REVERSE_KL: _reverse_kl,
    Divergence.TVD: _tvd,
    Divergence.HELLINGER: _hellinger,
}


def pointwise(divergence: Divergence, beta: float) -> Formula:
    """Return the function that computes ``(f, h)`` of a divergence."""
    if divergence is Divergence.JSD and beta == 0.5:
        return _jsd_half
    return _TABLE[divergence]
