"""Sparse targets from rows of a teacher's logits: sampled tokens, or the most probable ones."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor, samples: int, proposal_temperature: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw tokens with replacement, as arXiv 2503.16870 does, and count them.

    The proposal is ``softmax(logits / proposal_temperature)``. Its tokens get the importance weight
    ``p / proposal``, so that ``draws * weight / samples`` has the expectation ``p``. At
    ``proposal_temperature=1`` all weights are 1, and are left out.
    """
    proposal = (logits / proposal_temperature).softmax(-1)
    ids = proposal.multinomial(samples, replacement=True, generator=generator).sort(-1).values
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    flat = starts.flatten().nonzero()[:, 0]
    ends = torch.cat([flat[1:], flat.new_tensor([ids.numel()])])
    made = {
        "sizes": starts.sum(-1).to(torch.int32),
        "ids": ids[starts].to(torch.int32),
        # A run of equal ids never crosses a row, because every row begins a run.
        "draws": (ends - flat).to(torch.uint8 if samples < 256 else torch.int32),
    }
    if proposal_temperature != 1.0:
        weights = logits.softmax(-1) / proposal.clamp(min=torch.finfo(proposal.dtype).tiny)
        made["weights"] = weights.gather(-1, ids)[starts].float()
    return {name: x.cpu() for name, x in made.items()}


def most_probable(logits: Tensor, number: int) -> dict[str, Tensor]:
    """Return the ``number`` most probable tokens, which are biased as targets."""
    p, ids = logits.softmax(-1).topk(min(number, logits.shape[-1]))
    sizes = torch.full((len(ids),), ids.shape[-1], dtype=torch.int32)
    made = {"ids": ids.flatten().to(torch.int32), "weights": p.flatten().float()}
    return {"sizes": sizes, **{name: x.cpu() for name, x in made.items()}}
