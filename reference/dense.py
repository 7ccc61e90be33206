"""The oracle: computes every quantity by its definition, in float64, with autograd.

The oracle shares no code with the library, and keeps all probabilities in memory. A head is any
object with the attributes of ``lens_kernels.LensHead``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def normalise(h: Tensor, norm: Any) -> Tensor:
    """Apply a norm as its own paper defines it."""
    if norm is None:
        return h
    if norm.kind == "layer":
        variance = h.var(-1, unbiased=False, keepdim=True)
        y = (h - h.mean(-1, keepdim=True)) / torch.sqrt(variance + norm.eps)
    else:
        y = h / torch.sqrt((h**2).mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        y = y * (norm.offset + norm.weight.double())
    return y if norm.bias is None else y + norm.bias.double()


def lens_logits(hidden: Tensor, head: Any, normed: bool, vocab_size: int | None) -> Tensor:
    """Return the logits of a hidden state, ``(..., V)``, as a model computes them."""
    x = normalise(hidden.double(), head.norm if normed else None)
    z = x @ head.weight[:vocab_size].double().T
    if head.bias is not None:
        z = z + head.bias[:vocab_size].double()
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def softmax(z: Tensor) -> Tensor:
    """Return the softmax over the last dimension."""
    e = torch.exp(z - z.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Return KL(a, b) = sum a log(a / b) along the last dimension, with 0 log 0 = 0."""
    positive = a > 0
    ratio = torch.where(positive, a, 1.0) / torch.where(positive, b, 1.0)
    return (a * torch.log(ratio)).sum(-1)


def standardise(z: Tensor) -> Tensor:
    """Return logits minus their mean, in units of their unbiased deviation."""
    return (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True)


def divergence(name: str, p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    """Return the divergence called ``name`` between teacher ``p`` and student ``q``."""
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "jeffreys":
        return kl(p, q) + kl(q, p)
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "tvd":
        return (p - q).abs().sum(-1) / 2
    if name == "hellinger":
        # The gradient of 1 - sum sqrt(p q) is finite where p == q.
        return ((p + q) / 2 - torch.sqrt(p * q)).sum(-1)
    raise ValueError(f"unknown divergence {name!r}")


def rows(
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    student_head: Any,
    teacher_head: Any,
    *,
    divergences: Sequence[str],
    normed: Sequence[bool],
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    standardize: bool = False,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Return the divergence of each lens pair and token, ``(L, ...)``.

    With ``labels``, a last row holds the cross entropy.
    """
    theirs = temperature if teacher_temperature is None else teacher_temperature
    values = []
    for h_s, h_t, name, with_norm in zip(
        student_hidden, teacher_hidden, divergences, normed, strict=True
    ):
        z_s = lens_logits(h_s, student_head, with_norm, vocab_size)
        with torch.no_grad():
            z_t = lens_logits(h_t, teacher_head, with_norm, vocab_size)
            p = softmax((standardise(z_t) if standardize else z_t) / theirs)
        z = standardise(z_s) if standardize else z_s
        values.append(divergence(name, p, softmax(z / temperature), beta))
    if labels is not None:
        values.append(-torch.log(softmax(z_s).gather(-1, labels[..., None])[..., 0]))
    return torch.stack(values)


def lens_loss(
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    student_head: Any,
    teacher_head: Any,
    *,
    mask: Tensor | None = None,
    divergence: str = "jsd",
    layer_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    denominator: float | None = None,
    **options: Any,
) -> Tensor:
    """Return the loss of lists of hidden states, as ``symmetric_lens_loss`` defines it."""
    pairs = len(student_hidden)
    weights = [1 / pairs] * pairs if layer_weights is None else layer_weights
    values = rows(
        student_hidden,
        teacher_hidden,
        student_head,
        teacher_head,
        divergences=[divergence] * pairs,
        normed=[True] * pairs,
        **options,
    )
    kept = torch.ones_like(values[0]) if mask is None else mask.double()
    values = values * kept
    if reduction == "none":
        return values
    total = sum(w * v.sum() for w, v in zip(weights, values, strict=True))
    if reduction == "sum":
        return total
    return total / (max(1.0, kept.sum().item()) if denominator is None else denominator)
