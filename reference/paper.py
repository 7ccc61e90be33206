"""The lens term of DistillLens (arXiv 2602.13567) as its published code computes it.

This module is only for comparison, and was written from a description of that code. The published
code differs from this library's objective in three ways. Each difference is a switch, off by
default:

- ``tiled_mask``: lens logits are ordered with layers innermost, but the mask is tiled with samples
  innermost. With more than one sample, most rows get another sample's mask.
- ``log_epsilon``: a number added to the mixture inside its logarithm, published as 1e-8. It lowers
  every divergence by about ``epsilon * V``, so identical distributions get a negative divergence.
- ``final_norm=False``: for both models, intermediate hidden states reach the head without the
  final norm.

With all three off, the result equals ``symmetric_lens_loss`` with ``divergence="jsd"`` and its
defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference import dense


@dataclass(frozen=True)
class Quirks:
    """Switches for the differences between the published code and this library's objective."""

    tiled_mask: bool = False
    log_epsilon: float = 0.0
    final_norm: bool = True


OURS = Quirks()
PUBLISHED = Quirks(tiled_mask=True, log_epsilon=1e-8, final_norm=False)


def jsd(p: Tensor, q: Tensor, log_epsilon: float) -> Tensor:
    """Return ``(KL(p, m) + KL(q, m)) / 2`` along the last dimension, with ``m = (p + q) / 2``."""
    log_m = torch.log((p + q) / 2 + log_epsilon)

    def half(a: Tensor) -> Tensor:
        positive = a > 0
        log_ratio = torch.log(torch.where(positive, a, 1.0)) - torch.where(positive, log_m, 0.0)
        return (a * log_ratio).sum(-1) / 2

    return half(p) + half(q)


def lens_term(
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    student_head: Any,
    teacher_head: Any,
    *,
    mask: Tensor,
    quirks: Quirks = OURS,
) -> Tensor:
    """Return the lens term of the objective: a mean over samples, layers and unmasked positions.

    Hidden states are lists over layers of ``(B, T, D)``; ``mask`` is ``(B, T)``. The
    result is in float64. If all positions are masked, the result is 0, where the published code
    divides 0 by 0.
    """
    samples, layers = student_hidden[0].shape[0], len(student_hidden)

    def probabilities(hidden: Sequence[Tensor], head: Any) -> Tensor:
        """Return ``(B * n, T, V)``, where row ``b * n + l`` is layer ``l`` of sample ``b``."""
        logits = [dense.lens_logits(h, head, quirks.final_norm, None) for h in hidden]
        return dense.softmax(torch.stack(logits, dim=1).flatten(0, 1))

    p = probabilities(teacher_hidden, teacher_head).detach()
    q = probabilities(student_hidden, student_head)
    row = torch.arange(samples * layers, device=mask.device)
    sample_of_row = row % samples if quirks.tiled_mask else row // layers
    row_mask = mask.double()[sample_of_row]
    total = (jsd(p, q, quirks.log_epsilon) * row_mask).sum()
    return total / row_mask.sum().clamp(min=1)
