"""Tiles of logits, and the order of GEMMs and passes over them on a GPU.

With two sets of tiles, the pass over one set runs beside the GEMMs that fill the other set, on a
second stream. The pass is limited by memory traffic and the GEMMs by arithmetic, so both together
may take less time. No GPU has shown this yet, so ``layout.TILE_SETS`` is 1: one set, one stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class SecondStream:
    """A CUDA stream beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> torch.cuda.Event:
        """Run ``work`` after all work so far. Later work must wait for the returned event."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            work()
            return self.stream.record_event()


class TileSets:
    """Sets of tiles that are used in turn. With several sets, passes run on a second stream."""

    def __init__(self, sets: list[list[Tensor]]) -> None:
        self.sets, self.current = sets, 0
        self.second = SecondStream(sets[0][0].device) if len(sets) > 1 else None
        self.running: list[torch.cuda.Event | None] = [None for _ in sets]

    def next(self) -> list[Tensor]:
        """Return the next set, which GEMMs may overwrite after the last pass over it."""
        self.current = (self.current + 1) % len(self.sets)
        self._wait(self.current)
        return self.sets[self.current]

    def run(self, work: Callable[[], None]) -> None:
        """Run the pass over the current set."""
        if self.second is None:
            work()
        else:
            self.running[self.current] = self.second.run(work)

    def wait(self) -> None:
        """Make later work wait for all passes."""
        for index in range(len(self.sets)):
            self._wait(index)

    def _wait(self, index: int) -> None:
        event, self.running[index] = self.running[index], None
        if event is not None:
            event.wait()
