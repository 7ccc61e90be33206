"""Means over tokens of what the objective reports, added up without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lens_kernels.hf.objective import Outcome


class Meter:
    """Sums over tokens, of any number of batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, outcome: Outcome) -> None:
        """Add a batch."""
        for name, value in {**outcome.sums, "tokens": outcome.num_tokens}.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Return the means in nats per token, and start anew; ``reduce`` adds up processes."""
        if not self._sums:
            return {}
        values = reduce(torch.stack([x.double() for x in self._sums.values()])).tolist()
        named = dict(zip(self._sums, values, strict=True))
        tokens = named.pop("tokens")
        self._sums = {}
        return {name: value / tokens for name, value in named.items()} if tokens else {}
