"""The divergences, once: each a pointwise pair ``(f, h)`` over the vocabulary.

``f`` sums over the vocabulary to the divergence, and ``h`` gives its gradient with respect to the
student's (tempered) logits as ``G = h - q * sum(h)``. That form ignores what is added to ``f`` as a
multiple of ``p - q`` (which sums to 0) and to ``h`` as a multiple of ``q``; both freedoms are used
so that every term is of second order in ``d = log p - log q``, hence exactly 0 where ``p == q`` and
accurate near it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lens_kernels.spec import Divergence

Pointwise = tuple[Tensor, Tensor]
# Of log p, log q, p, q, which the caller has anyway, and beta, a number or a tensor of one.
Number = float | Tensor
Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Number], Pointwise]
NEAR = 0.5  # |d| below which differences of p and q go through expm1


def _expm1(x: Tensor) -> Tensor:
    """``exp(x) - 1`` for ``|x| <= NEAR``."""
    if not torch.compiler.is_compiling():
        return torch.expm1(x)
    # For CPUs Inductor of torch 2.13 writes exp(x) - 1, which leaves nothing near 0. Taylor's
    # series, to the rounding of the dtype.
    total = torch.ones_like(x)
    for n in range(15 if x.dtype is torch.float64 else 8, 1, -1):
        total = 1 + x * (1 / n) * total  # a division by n would stay one
    return x * total


def _minus(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """``p - q`` without cancellation: ``q expm1(d)`` near the diagonal."""
    near = d.clamp(-NEAR, NEAR)
    return torch.where(near == d, q * _expm1(near), p - q)


def _jsd(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Number) -> Pointwise:
    # With m = beta p + (1 - beta) q: log m - log q = relu(d) + l and log p - log m = -relu(-d) - l,
    # where l = log1p(k expm1(-|d|)) and k = 1 - beta for d > 0, else beta. Relative accuracy holds
    # from d = 0 to d = +-inf.
    d = lp - lq
    # exp(-|d|) without an exponential; where both are 0 the terms are too, whatever l is.
    larger = torch.maximum(p, q).clamp(min=torch.finfo(p.dtype).tiny)
    far = torch.minimum(p, q) / larger - 1
    near = -d.abs().clamp(max=NEAR)
    e = torch.where(near > -NEAR, _expm1(near), far)
    l = torch.log1p(torch.where(d > 0, (1 - beta) * e, beta * e))  # noqa: E741
    student = (1 - beta) * q * (d.clamp(min=0) + l)
    return beta * p * (d.clamp(max=0) - l) - student, -student


def _jeffreys(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Number) -> Pointwise:
    d = lp - lq
    diff = _minus(p, q, d)
    return diff * d, -diff - q * d


def _forward_kl(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Number) -> Pointwise:
    d = lp - lq
    diff = _minus(p, q, d)
    return p * d - diff, -diff


def _reverse_kl(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Number) -> Pointwise:
    d = lp - lq
    return _minus(p, q, d) - q * d, -q * d


def _tvd(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Number) -> Pointwise:
    diff = _minus(p, q, lp - lq)
    return diff.abs() / 2, -q * diff.sign() / 2


def _hellinger(lp: Tensor, lq: Tensor, p: Tensor, q: Tensor, beta: Number) -> Pointwise:
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


def pointwise(divergence: Divergence) -> Formula:
    """Return the function that makes ``(f, h)`` of a divergence."""
    return _TABLE[divergence]
