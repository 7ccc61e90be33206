"""The search for the fastest tile of every sweep on one GPU.

``triton.autotune(cache_results=True)`` (Triton 3.6 to 3.9) cannot replace this search. It would
start tuning in an ordinary training step, does not compare results, and stops at errors of the
compiler or the driver. Its cache cannot be read without a launch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from lens_kernels.backends.triton.kernels.gradients import gradient_chunk
from lens_kernels.backends.triton.kernels.launch import Tile
from lens_kernels.backends.triton.kernels.online_kl import online_kl
from lens_kernels.backends.triton.kernels.operands import Operand, RowSums
from lens_kernels.backends.triton.kernels.row_stats import row_stats
from lens_kernels.backends.triton.kernels.row_sums import row_sums
from lens_kernels.backends.triton.tiles import sizes, store
from lens_kernels.backends.triton.tiles.sizes import Arch, Sweep
from lens_kernels.options import Divergence

BLOCKS_NV = ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128))
BLOCKS_K, WARPS, STAGES = (32, 64), (4, 8), (2, 3, 4)
# Threads with fewer accumulators would load tiles for longer than they multiply.
FEWEST_ACCUMULATORS = 64
# The allowed difference between the results of two tiles, relative to the largest result.
TOLERANCE = 1e-4
# The bytes of logit gradients that a launch of sweep 3 writes.
WORKSPACE_BYTES = 1 << 28
# Texts that identify errors of the compiler and the driver, which are RuntimeErrors without a class
# of their own.
REJECTIONS = ("PassManager::run failed", "too many resources requested")

Timer = Callable[[Callable[[], object]], float]


@dataclass
class Outcome:
    """The result of tuning a sweep: the time of each tile in ms, and why other tiles failed."""

    sweep: Sweep
    width: int
    default: Tile
    times: dict[Tile, float] = field(default_factory=dict)
    rejected: dict[Tile, str] = field(default_factory=dict)

    @property
    def best(self) -> Tile:
        """The fastest tile."""
        return min(self.times, key=lambda tile: self.times[tile])

    def row(self) -> tuple[str, ...]:
        """Return the outcome as the cells of a table row."""
        cells = [self.sweep.value, str(self.width)]
        for tile in (self.default, self.best):
            time = self.times.get(tile)
            cells += [str(tile), "rejected" if time is None else f"{time:.3f}"]
        return *cells, str(len(self.times) + len(self.rejected)), str(len(self.rejected))


def candidates(sweep: Sweep, arch: Arch, itemsize: int) -> list[Tile]:
    """Return the tiles that may be fast enough to be timed."""
    found = []
    for (n, v), k, warps, stages in itertools.product(BLOCKS_NV, BLOCKS_K, WARPS, STAGES):
        tile = Tile(n, v, k, warps, stages)
        accumulators = sweep.accumulators * n * v // (warps * arch.threads_per_warp)
        valid = sizes.invalid_reason(tile, sweep, arch, itemsize) is None
        if valid and accumulators >= FEWEST_ACCUMULATORS:
            found.append(tile)
    return found


def rejection(error: Exception) -> str | None:
    """Return why the compiler or the driver rejected a tile. Return None for any other error."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, triton.TritonError):
        return f"{type(error).__name__}: {lines[-1].strip()}"
    if isinstance(error, RuntimeError) and any(text in str(error) for text in REJECTIONS):
        return lines[-1].strip()
    return None


def difference(results: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> str | None:
    """Return a message if results differ from ``truth`` by more than the tolerance, else None.

    The host waits for the GPU.
    """
    for result, true in zip(results, truth, strict=True):
        error = (result - true).abs().max().item() / max(true.abs().max().item(), 1e-30)
        if not error <= tolerance:
            return f"the results are off by {error:.1e} of the largest result"
    return None


@contextlib.contextmanager
def nan_in_new_tensors() -> Iterator[None]:
    """Fill new tensors with NaN, because a wrong tile could find right results in old memory."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def median_ms(function: Callable[[], object]) -> float:
    """Return the median time of a function on the GPU in milliseconds."""
    return triton.testing.do_bench(function, return_mode="median")


@dataclass
class Search:
    """Searches for the fastest tile of each sweep, and saves it.

    ``timer`` returns the milliseconds that a function takes. ``say`` prints a line of progress.
    """

    student: Operand
    teacher: Operand
    vocab_size: int
    timer: Timer
    say: Callable[[str], None]
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self) -> list[Outcome]:
        """Tune all sweeps in order, because each sweep needs the results of earlier sweeps."""
        student, teacher, vocab_size = self.student, self.teacher, self.vocab_size
        student_stats, teacher_stats = (
            self.search(Sweep.ROW_STATS, partial(row_stats, operand, vocab_size), operand)
            for operand in (student, teacher)
        )
        both = student, teacher
        online = partial(online_kl, *both, Divergence.JEFFREYS, vocab_size)
        self.search(Sweep.ONLINE_KL, online, *both)
        sums = partial(
            row_sums, *both, student_stats, teacher_stats, Divergence.JSD, 0.5, vocab_size
        )
        gradient = partial(self.gradient, self.search(Sweep.ROW_SUMS, sums, *both))
        # Gradients are rounded to the operands' dtype, so larger differences are allowed.
        tolerance = max(TOLERANCE, 4 * torch.finfo(student.x.dtype).eps)
        self.search(Sweep.GRADIENTS, gradient, *both, tolerance=tolerance)
        return self.outcomes

    def gradient(self, sums: RowSums, tile: Tile) -> Tensor:
        """Launch sweep 3 over a chunk of the vocabulary.

        The chunk's size is a multiple of the block size of every candidate.
        """
        x, vocab_size = self.student.x, self.vocab_size
        unit = max(v for _, v in BLOCKS_NV)
        units = max(1, WORKSPACE_BYTES // (len(x) * x.element_size() * unit))
        out = x.new_empty(len(x), unit * min(units, math.ceil(vocab_size / unit)))
        weight = torch.ones(len(x), device=x.device)
        gradient_chunk(
            self.student, self.teacher, sums, weight, None, Divergence.JSD, 0.5, vocab_size, 0,
            out, tile,
        )  # fmt: skip
        return out[:, :vocab_size]

    def search(
        self,
        sweep: Sweep,
        launch: Callable[[Tile], Any],
        *operands: Operand,
        tolerance: float = TOLERANCE,
    ) -> Any:
        """Find and store the fastest tile of a sweep, and return the result of its launch."""
        width = min(operand.x.shape[1] for operand in operands)
        known = [o for o in self.outcomes if (o.sweep, o.width) == (sweep, width)]
        if not known:
            known = [self.time_tiles(sweep, width, launch, tolerance)]
            self.outcomes += known
            x = self.student.x
            key = sweep, x.dtype, width
            store.save(store.device_name(x.device), key, known[0].best)
        return launch(known[0].best)

    def time_tiles(
        self, sweep: Sweep, width: int, launch: Callable[[Tile], Any], tolerance: float
    ) -> Outcome:
        """Time the default tile and all candidates.

        A tile is rejected if it raises an error or gives wrong results.
        """
        dtype, arch = self.student.x.dtype, sizes.arch_of(self.student.x.device)
        outcome = Outcome(sweep, width, sizes.default(sweep, arch, dtype, width))
        tiles = dict.fromkeys([outcome.default, *candidates(sweep, arch, dtype.itemsize)])
        truth: Sequence[Tensor] | None = None
        for number, tile in enumerate(tiles, 1):
            try:
                with nan_in_new_tensors():
                    results = _tensors(launch(tile))
                reason = difference(results, truth or results, tolerance)
                if reason is None:
                    truth = truth or results
                    outcome.times[tile] = self.timer(partial(launch, tile))
            except Exception as error:
                reason = rejection(error)
                if reason is None:
                    raise
            if reason is not None:
                outcome.rejected[tile] = reason
            said = f"rejected, {reason}" if reason else f"{outcome.times[tile]:.3f} ms"
            self.say(f"{sweep.value}, width {width}, {number} of {len(tiles)}: {tile}: {said}")
        if not outcome.times:
            reason = outcome.rejected[outcome.default]
            raise RuntimeError(
                f"no tile for the sweep {sweep.value} runs on this GPU. The default tile was "
                f"rejected: {reason}"
            )
        return outcome


def _tensors(result: Any) -> list[Tensor]:
    if result is None or isinstance(result, Tensor):
        return [] if result is None else [result]
    return [tensor for part in vars(result).values() for tensor in _tensors(part)]
