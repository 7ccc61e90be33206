"""The adaptive KL of Wu et al. 2024 (arXiv 2404.02657), as in its published code."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import dense


def head(p: Tensor, mass: float = 0.5) -> list[int]:
    """Return the head: the most probable entries, as many as sum to at most ``mass``.

    Entries are taken in order of probability. The most probable entry is always in the head.
    """
    entries: list[int] = []
    held = 0.0
    for entry in sorted(range(len(p)), key=lambda i: -p[i].item()):
        held += p[entry].item()
        if entries and held > mass:
            break
        entries.append(entry)
    return entries


def head_share(p: Tensor, q: Tensor) -> float:
    """Return the head's share of ``sum |p - q|``, or 0.5 if ``p == q``."""
    gap = (p - q).abs().tolist()
    of_head = set(head(p))
    gap_head = sum(g for i, g in enumerate(gap) if i in of_head)
    gap_tail = sum(g for i, g in enumerate(gap) if i not in of_head)
    return 0.5 if gap_head == gap_tail == 0 else gap_head / (gap_head + gap_tail)


def adaptive_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return each row's adaptive KL, for teacher ``p`` and student ``q``, both ``(..., V)``."""
    vocab = p.shape[-1]
    pairs = zip(p.reshape(-1, vocab), q.detach().reshape(-1, vocab), strict=True)
    share = torch.tensor([head_share(*pair) for pair in pairs], dtype=p.dtype)
    share = share.reshape(p.shape[:-1])
    return share * dense.kl(p, q) + (1 - share) * dense.kl(q, p)
