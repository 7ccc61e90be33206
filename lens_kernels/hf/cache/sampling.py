"""Makes sparse targets from a teacher's logits: sampled tokens, or the most probable tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor, samples: int, proposal_temperature: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw and count tokens for each row of logits, with replacement, as in arXiv 2503.16870.

    Tokens are drawn from ``proposal = softmax(logits / proposal_temperature)``. A drawn token gets
    the importance weight ``p / proposal``, where ``p = softmax(logits)``. The expectation of
    ``draws * weight / samples`` is then ``p``. If ``proposal_temperature`` is 1, all weights are 1,
    and are not returned.
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
        # ``starts`` is True in each row's first column, so that runs of equal ids end with the row.
        "draws": (ends - flat).to(torch.uint8 if samples < 256 else torch.int32),
    }
    if proposal_temperature != 1.0:
        weights = logits.softmax(-1) / proposal.clamp(min=torch.finfo(proposal.dtype).tiny)
        made["weights"] = weights.gather(-1, ids)[starts].float()
    return {name: x.cpu() for name, x in made.items()}


def most_probable(logits: Tensor, number: int) -> dict[str, Tensor]:
    """Return the ``number`` most probable tokens of each row. Targets made from them are biased."""
    p, ids = logits.softmax(-1).topk(min(number, logits.shape[-1]))
    sizes = torch.full((len(ids),), ids.shape[-1], dtype=torch.int32)
    made = {"ids": ids.flatten().to(torch.int32), "weights": p.flatten().float()}
    return {"sizes": sizes, **{name: x.cpu() for name, x in made.items()}}
