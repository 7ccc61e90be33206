"""The result of an inspection: several texts that several models read through the logit lens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lens_kernels.hf.inspection.reading import Comparison, Reading

TEACHER = "teacher"  # the label of the teacher
QUARTILES = (0.25, 0.5, 0.75)
# The quantiles of the entropies at the ends of the colour scale. A few entropies, such as those of
# the first token, lie far outside.
SCALE = (0.05, 0.95)
# Attributes of ``Reading`` that figures draw against depth, each with its axis label.
QUANTITIES = {
    "entropy": "entropy, nats",
    "final_kl": "KL to the final layer, nats",
    "next_prob": "probability of the right token",
    "next_rank": "rank of the right token (1 is best)",
}


@dataclass(frozen=True)
class Passage:
    """A text with each model's predictions of its tokens.

    Attributes:
        text: The text.
        ids: The text's token ids, up to the maximum number.
        tokens: The text of each token id, with spaces and control characters made visible.
        total_tokens: Number of the text's tokens, including those that are cut off.
        readings: The reading of each model, by label.
        comparisons: The comparisons of each model with the teacher, by label and ordered by depth;
            empty without a teacher.
    """

    text: str
    ids: list[int]
    tokens: list[str]
    total_tokens: int
    readings: dict[str, Reading]
    comparisons: dict[str, list[Comparison]]


@dataclass(frozen=True)
class Inspection:
    """The readings of models at every depth. Each model has a label.

    Attributes:
        divergence: Name of the divergence of the comparisons.
        names: Name of each model, by label.
        passages: The texts with their readings.
        top_tokens: The text of each token id that a reading holds.
    """

    divergence: str
    names: dict[str, str]
    passages: list[Passage]
    top_tokens: dict[int, str]

    def values(self, label: str, quantity: str) -> Tensor:
        """Return a model's values of a quantity, at all depths and tokens: ``(L, tokens)``.

        ``quantity`` is a key of ``QUANTITIES``, and ``label`` one of ``names``.
        """
        return torch.cat([getattr(x.readings[label], quantity) for x in self.passages], dim=1)

    def quartiles(self, label: str, quantity: str) -> Tensor:
        """Return the quartiles of a ``quantity`` of the model ``label`` over tokens, ``(3, L)``."""
        values = self.values(label, quantity).double()
        return values.quantile(torch.tensor(QUARTILES, dtype=values.dtype), dim=1)

    def depths(self, label: str) -> int:
        """Return the number of blocks of the model whose label is ``label``."""
        return self.passages[0].readings[label].depths

    def compared(self, label: str) -> list[Comparison]:
        """Return the comparisons of ``label`` with the teacher, over the tokens of all texts."""
        each = [x.comparisons[label] for x in self.passages if label in x.comparisons]
        return [
            replace(same[0], divergence=torch.cat([c.divergence for c in same]))
            for same in zip(*each, strict=True)
        ]

    @property
    def scale(self) -> tuple[float, float]:
        """The lowest and highest entropy on the colour scale, for all models and passages."""
        every = torch.cat([self.values(label, "entropy").flatten() for label in self.names])
        low, high = every.double().quantile(torch.tensor(SCALE, dtype=torch.double)).tolist()
        return low, high if high > low else low + 1

    def heat(self, entropy: Tensor) -> Tensor:
        """Map ``entropy`` to the colour scale, from 0 to 1."""
        low, high = self.scale
        return ((entropy - low) / (high - low)).clamp(0, 1)

    def top(self, passage: Passage, label: str, depth: int, position: int) -> tuple[str, bool]:
        """Return the token that the model ``label`` predicts at ``depth`` after ``position``.

        Return also whether it equals the next token of ``passage``.
        """
        token = int(passage.readings[label].top_ids[depth - 1, position, 0])
        return self.top_tokens[token], [token] == passage.ids[position + 1 : position + 2]
