"""Measures times in interleaved rounds, and ratios of times within rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """The times of one function in milliseconds, by the number of the round."""

    by_round: Mapping[int, float]

    @classmethod
    def read(cls, text: str) -> Timing:
        """Return the times from a CSV cell that ``__str__`` wrote."""
        pairs = (each.split(":") for each in text.split())
        return cls({int(number): float(ms) for number, ms in pairs})

    def __str__(self) -> str:
        return " ".join(f"{number}:{ms:.2f}" for number, ms in self.by_round.items())

    @property
    def median_ms(self) -> float:
        """The median time over all rounds."""
        return statistics.median(self.by_round.values())

    def ratios(self, other: Timing) -> list[float]:
        """Return the ratios to another function's times, for all rounds that have both times."""
        both = sorted(self.by_round.keys() & other.by_round.keys())
        return [self.by_round[number] / other.by_round[number] for number in both]

    def columns(self, digits: int = 2, floor: Timing | None = None) -> dict[str, Any]:
        """Return the times as columns of a CSV. If there are no times, return only ``rounds``.

        ``floor`` has the times of the GEMMs alone. ``ratio_to_floor`` is a ratio of two medians.
        """
        columns: dict[str, Any] = {"rounds": len(self.by_round)}
        if times := self.by_round.values():
            ends = {"median": self.median_ms, "min": min(times), "max": max(times)}
            columns |= {f"{name}_ms": f"{ms:.{digits}f}" for name, ms in ends.items()}
        if floor is not None:
            columns["ratio_to_floor"] = f"{self.median_ms / floor.median_ms:.2f}"
        return columns


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    progress: bool = True,
) -> dict[str, Timing]:
    """Time functions in rounds. Each function runs once in a round. A first round is not timed.

    Interleaving spreads disturbances of the machine over all functions. Each round starts with
    another function. Caches need not be flushed, because the heads are larger than all caches.
    """
    times: dict[str, dict[int, float]] = {name: {} for name in functions}
    for number in range(rounds + 1):
        for name in rotated([*functions], number):
            elapsed = seconds(functions[name], device)
            if number:
                times[name][number] = elapsed * 1e3
            if progress:
                label = f"round {number} of {rounds}" if number else "warm-up"
                print(f"  {label}: {name} {elapsed:.2f} s", flush=True)
    return {name: Timing(by_round) for name, by_round in times.items()}


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Return the order of the names in a round. Each round starts with another name."""
    shift = number % len(names)
    return [*names[shift:], *names[:shift]]


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the time of one call in seconds, including its work on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def matmul_rate(device: torch.device) -> float:
    """Return the fp32 operations per second of a GEMM as large as those of the benchmarks."""
    x, weight = torch.randn(512, 1024, device=device), torch.randn(8192, 1024, device=device)
    best = min(seconds(lambda: x @ weight.t(), device) for _ in range(5))
    return 2 * 512 * 1024 * 8192 / best
