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
Formula = Callable[[Tensor, Tensor, float], Pointwise]
NEAR = 0.5  # |d| below which differences of p and q go through expm1


def _minus(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """``p - q`` without cancellation: ``q expm1(d)`` near the diagonal."""
    near = d.clamp(-NEAR, NEAR)
    return torch.where(near == d, q * torch.expm1(near), p - q)


def _jsd(lp: Tensor, lq: Tensor, beta: float) -> Pointwise:
    # With m = beta p + (1 - beta) q: log m - log q = relu(d) + l and log p - log m = -relu(-d) - l,
    # where l = log1p(k expm1(-|d|)). Relative accuracy holds from d = 0 to d = +-inf.
    d = lp - lq
    k = torch.where(d > 0, d.new_full((), 1 - beta), d.new_full((), beta))  # not as float32
    l = torch.log1p(k * torch.expm1(-d.abs()))  # noqa: E741
    student = (1 - beta) * lq.exp() * (d.clamp(min=0) + l)
    return beta * lp.exp() * (d.clamp(max=0) - l) - student, -student


def _jeffreys(lp: Tensor, lq: Tensor, beta: float) -> Pointwise:
    d, p, q = lp - lq, lp.exp(), lq.exp()
    diff = _minus(p, q, d)
    return diff * d, -diff - q * d


def _forward_kl(lp: Tensor, lq: Tensor, beta: float) -> Pointwise:
    d, p, q = lp - lq, lp.exp(), lq.exp()
    diff = _minus(p, q, d)
    return p * d - diff, -diff


def _reverse_kl(lp: Tensor, lq: Tensor, beta: float) -> Pointwise:
    d, p, q = lp - lq, lp.exp(), lq.exp()
    return _minus(p, q, d) - q * d, -q * d


def _tvd(lp: Tensor, lq: Tensor, beta: float) -> Pointwise:
    q = lq.exp()
    diff = _minus(lp.exp(), q, lp - lq)
    return diff.abs() / 2, -q * diff.sign() / 2


def _hellinger(lp: Tensor, lq: Tensor, beta: float) -> Pointwise:
    root_q = (lq / 2).exp()
    diff = _minus((lp / 2).exp(), root_q, (lp - lq) / 2)
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
    """Return the function that makes ``(f, h)`` of log-probabilities, the teacher's first."""
    return _TABLE[divergence]
