"""Estimates entropies of the lenses' predictions, for the Trainer's logs, from some tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lens_kernels.lens import LensHead

# Entropies use every 16th token, which takes about 3 % of the time of the loss.
STRIDE = 16
# The peak memory of a tile, in multiples of its float32 logits. Heads with a soft cap need the
# most.
TILES = 6


@torch.no_grad()
def entropy_sum(rows: Tensor, head: LensHead, temperature: float, workspace: int) -> Tensor:
    """Estimate the sum of the entropies of ``rows`` ``(N, D)`` from every 16th row, in nats.

    ``head`` has a norm if the rows are not normed yet, and no norm otherwise. The logits are
    computed in tiles, of at most ``workspace`` bytes or one row.
    """
    sample = rows[::STRIDE]
    row_bytes = TILES * head.weight.shape[0] * torch.float32.itemsize
    total = rows.new_zeros((), dtype=torch.float32)
    for x in sample.split(max(1, workspace // row_bytes)):
        total += _entropies(x, head, temperature).sum()
    return total * (len(rows) / max(1, len(sample)))


def _entropies(x: Tensor, head: LensHead, temperature: float) -> Tensor:
    if head.norm is not None:
        x = head.norm.forward(x.float())[0]
    products = x.to(head.weight.dtype) @ head.weight.T
    log_p = head.logits(products.float(), temperature)[0].log_softmax(-1)
    del products  # frees memory before the step that needs the most
    return -(log_p.exp() * log_p).sum(-1)
