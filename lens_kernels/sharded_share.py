"""The head of the vocabulary in the adaptive KL, if the vocabulary is sharded over ranks.

The head is the set of the teacher's largest probabilities that sum to at most one half. No rank can
sort all probabilities, so a search over the bits of floating-point numbers finds the smallest
probability of the head. The bits of positive numbers have the same order as the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lens_kernels.sharding import Reduction

# The number of parts into which each reduction over ranks divides the interval of the search.
PARTS = 16


def softmax(logits: list[Tensor], reduce: Reduction) -> tuple[Tensor, ...]:
    """Return the probabilities of this rank's entries, ``(R, C)``, for several models at once."""
    maxima = reduce.maximum(torch.stack([u.amax(-1) for u in logits]))
    powers = [(u - m[:, None]).exp() for u, m in zip(logits, maxima, strict=True)]
    totals = reduce.sum(torch.stack([x.sum(-1) for x in powers]))
    return tuple(x / total[:, None] for x, total in zip(powers, totals, strict=True))


def head(p: Tensor, mass: float, reduce: Reduction) -> Tensor:
    """Return which of this rank's entries belong to the head, whose sum is at most ``mass``.

    Of equal entries, those of lower ranks come first. The largest entry always belongs to the head.
    """
    integer = torch.int64 if p.dtype is torch.float64 else torch.int32
    ascending = p.sort(-1).values
    # ``below[:, n]`` is the sum of the n largest entries.
    below = torch.nn.functional.pad(ascending.flip(-1).cumsum(-1), (1, 0))

    def mass_from(bits: Tensor) -> Tensor:
        """For each bound, return the sum of this rank's entries at or above the bound, ``(R, K)``.

        A bound is the bits of a floating-point number.
        """
        smaller = torch.searchsorted(ascending, bits.to(integer).view(p.dtype).contiguous())
        return below.gather(-1, p.shape[-1] - smaller)

    # All entries from ``low`` on sum to more than ``mass``. All entries from ``high`` on do not.
    low = torch.zeros(p.shape[0], 1, dtype=torch.int64, device=p.device)
    high = torch.full_like(low, int(torch.tensor(2.0, dtype=p.dtype).view(integer)))
    steps = torch.arange(1, PARTS, device=p.device)
    for _ in range(p.element_size() * 2):  # each step finds 4 bits
        width = high - low
        inner = low + width // PARTS * steps + width % PARTS * steps // PARTS
        above = (reduce.sum(mass_from(inner)) > mass).sum(-1, keepdim=True)
        bounds = torch.cat([low, inner, high], -1)
        low, high = bounds.gather(-1, above), bounds.gather(-1, above + 1)
    crossing = low.to(integer).view(p.dtype)

    ties = p == crossing
    larger = p > crossing
    # For each rank, a column counts its entries that equal the smallest entry of the head. The last
    # two columns are the number and the sum of all larger entries.
    counts = p.new_zeros(p.shape[0], reduce.size + 2)
    counts[:, reduce.rank] = ties.sum(-1).to(p.dtype)
    counts[:, -2] = larger.sum(-1).to(p.dtype)
    counts[:, -1] = p.where(larger, 0).sum(-1)
    reduce.sum(counts)
    allowed = ((mass - counts[:, -1]) / crossing[:, 0]).floor()
    allowed = allowed.clamp(min=(counts[:, -2] == 0).to(p.dtype))
    left = allowed - counts[:, : reduce.rank].sum(-1)
    return not_less(p, crossing, left[:, None])


def not_less(p: Tensor, least: Tensor, ties: Tensor) -> Tensor:
    """Return which entries of each row exceed ``least``, and the first ``ties`` equal entries.

    ``p`` is ``(R, V)``. ``least`` and ``ties`` are ``(R, 1)``.
    """
    equal = p == least
    return (p > least) | (equal & (equal.cumsum(-1) <= ties))
