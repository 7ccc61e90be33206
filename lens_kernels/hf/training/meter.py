"""Measures means over tokens, and the training speed, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens_kernels.hf.model.state import evaluating
from lens_kernels.hf.training.objective import LensObjective, Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _unreduced(sums: Tensor) -> Tensor:
    return sums


class Meter:
    """Accumulates the sums of batches, and returns their means over all tokens."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, outcome: Outcome) -> None:
        """Add the sums and the number of tokens of a batch."""
        for name, value in {**outcome.sums, "tokens": outcome.num_tokens}.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def means(self, reduce: Callable[[Tensor], Tensor] = _unreduced) -> dict[str, float]:
        """Return means in nats per token, and reset the sums. ``reduce`` adds all processes."""
        if not self._sums:
            return {}
        values = reduce(torch.stack([x.double() for x in self._sums.values()])).tolist()
        named = dict(zip(self._sums, values, strict=True))
        tokens = named.pop("tokens")
        self._sums = {}
        return {name: value / tokens for name, value in named.items()} if tokens else {}


class Speed:
    """Measures tokens per second since the last ``read``. Pauses are not counted."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start again with 0 tokens and a new start time."""
        self._tokens: Tensor | int = 0
        self._since = perf_counter()

    def add(self, tokens: Tensor | int) -> None:
        """Add the number of tokens of a batch."""
        self._tokens = self._tokens + tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the ``with`` block from the measurement."""
        started = perf_counter()
        try:
            yield
        finally:
            self._since += perf_counter() - started

    def read(self, reduce: Callable[[Tensor], Tensor] = _unreduced) -> float:
        """Return the tokens per second of all processes, and restart the measurement."""
        tokens = reduce(torch.as_tensor(self._tokens).double()).item()
        seconds = perf_counter() - self._since
        self.restart()
        return tokens / seconds


@torch.no_grad()
def evaluate(objective: LensObjective, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Evaluate an objective, and return the means of ``Outcome.sums`` in nats per token."""
    student: PreTrainedModel = objective.student
    meter = Meter()
    with evaluating(student):
        for batch in batches:
            meter.add(objective(batch))
    means = meter.means()
    if not means:
        raise ValueError("the batches hold no label, so there is nothing to evaluate: add labels")
    return means
