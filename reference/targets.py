"""The forward KL of a teacher that is known at a few tokens only, computed by its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import dense


def scattered(token_ids: Tensor, probabilities: Tensor, vocab: int) -> Tensor:
    """Return the probabilities of all tokens, ``(..., V)``. Unlisted tokens have probability 0."""
    t = torch.zeros(*token_ids.shape[:-1], vocab, dtype=torch.float64)
    return t.scatter_add(-1, token_ids, probabilities.double())


def forward_kl(t: Tensor, q: Tensor, rest: str | None = None) -> Tensor:
    """Return the KL from the listed probabilities ``t`` to the student ``q``.

    ``rest`` is the attribute of ``lens_kernels.SparseTargets``.
    """
    left = 1 - t.sum(-1, keepdim=True)
    if rest == "renormalize":
        t = t / t.sum(-1, keepdim=True)
    if rest == "uniform":
        t = t + left / t.shape[-1]
    if rest == "ghost":
        # Join all unlisted tokens of both models into one token.
        listed = t > 0
        t = torch.cat([t, left], -1)
        outside = torch.where(listed, 0.0, q).sum(-1, keepdim=True)
        q = torch.cat([torch.where(listed, q, 0.0), outside], -1)
    return dense.kl(t, q)
