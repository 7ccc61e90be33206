"""The search for the fastest tile of each sweep on the GPU at hand. Nothing here runs by itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from lens_kernels.backends.triton import agreement, tiles, trials, tuned
from lens_kernels.backends.triton.gradients import gradient_chunk
from lens_kernels.backends.triton.interpreter import INTERPRETING
from lens_kernels.backends.triton.online_kl import online_kl
from lens_kernels.backends.triton.operands import Operand, RowStats, RowSums, aligned
from lens_kernels.backends.triton.row_stats import row_stats
from lens_kernels.backends.triton.row_sums import row_sums
from lens_kernels.backends.triton.tiles import Sweep, Tile
from lens_kernels.spec import Divergence

# By which results of two tiles may differ, as a fraction of the largest.
TOLERANCE = 1e-4
# Logits' gradients that the third sweep writes at a time.
WORKSPACE_BYTES = 1 << 28

Launch = Callable[[Tile], Sequence[Tensor]]
Timer = Callable[[Callable[[], object]], float]


@dataclass
class Outcome:
    """What was found for one sweep: milliseconds of tiles, and why others were rejected."""

    sweep: Sweep
    width: int
    heuristic: Tile
    times: dict[Tile, float] = field(default_factory=dict)
    rejected: dict[Tile, str] = field(default_factory=dict)

    @property
    def best(self) -> Tile:
        """Return the fastest tile."""
        return min(self.times, key=lambda tile: self.times[tile])

    def row(self) -> tuple[str, ...]:
        """Return the outcome as a row of a table."""

        def cells(tile: Tile) -> tuple[str, str]:
            time = self.times.get(tile)
            return describe(tile), "rejected" if time is None else f"{time:.3f}"

        tried = len(self.times) + len(self.rejected)
        usual_and_best = (*cells(self.heuristic), *cells(self.best))
        counts = str(tried), str(len(self.rejected))
        return self.sweep.value, str(self.width), *usual_and_best, *counts


def objection() -> str | None:
    """Say why nothing can be tuned here, or return None."""
    if not torch.cuda.is_available():
        return f"tiles are timed on a GPU, and torch {torch.__version__} finds none"
    if INTERPRETING:
        return "TRITON_INTERPRET is set, so kernels would be interpreted; unset it"
    return None


def median_ms(function: Callable[[], object]) -> float:
    """Return the median time of a function on the GPU."""
    return triton.testing.do_bench(function, return_mode="median")


def tune(
    student_width: int,
    teacher_width: int,
    vocab_size: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
    path: Path | None = None,
    timer: Timer = median_ms,
    say: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Find and store the fastest tile of every sweep for a problem of these sizes.

    Before, the kernels are compared with the ``torch`` backend: tiles are compared with the usual
    one. The gradients' tile is the last to be stored, and says that all went well.

    Args:
        student_width: Hidden size of the student.
        teacher_width: Hidden size of the teacher.
        vocab_size: Entries of the vocabulary.
        tokens: Rows of a call that are not masked.
        dtype: That of the operands.
        device: The GPU; by default the current one.
        path: Where results are kept; only ``tuned.default_path()`` is ever read by itself.
        timer: Returns the milliseconds that a function takes.
        say: Is told of the progress, a line at a time.

    Returns:
        The outcome of each sweep, that of the row statistics for either width.

    Raises:
        RuntimeError: The kernels are wrong here, or no tile of a sweep runs.
        OSError: Results could not be kept.
    """
    path = tuned.default_path() if path is None else path
    tuned.check_writable(path)
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        say("comparing the kernels with the torch backend")
        agreement.check(student_width, teacher_width, vocab_size, tokens, dtype, device)
        generator = torch.Generator(device).manual_seed(0)
        student, teacher = (
            _side(tokens, vocab_size, width, dtype, generator)
            for width in (student_width, teacher_width)
        )
        run = _Tuning(student, teacher, vocab_size, path, timer, say)
        run.all_sweeps()
    return run.outcomes


class _Tuning:
    """One call of ``tune``: every sweep works on what the ones before it made."""

    def __init__(
        self,
        student: Operand,
        teacher: Operand,
        vocab_size: int,
        path: Path,
        timer: Timer,
        say: Callable[[str], None],
    ) -> None:
        self.student, self.teacher, self.vocab_size = student, teacher, vocab_size
        self.path, self.timer, self.say = path, timer, say
        self.dtype, self.device = student.x.dtype, student.x.device
        self.arch = tiles.arch_of(self.device)
        self.narrower = min(side.x.shape[1] for side in (student, teacher))
        self.outcomes: list[Outcome] = []

    def all_sweeps(self) -> None:
        """Tune the sweeps in their order."""
        student, teacher, vocab_size = self.student, self.teacher, self.vocab_size
        student_stats, teacher_stats = self.row_stats(student), self.row_stats(teacher)

        def launch_online(tile: Tile) -> Sequence[Tensor]:
            result = online_kl(student, teacher, Divergence.JEFFREYS, vocab_size, tile)
            return result.f, result.h, result.student.log_sum, result.teacher.log_sum

        self.search(Sweep.ONLINE_KL, self.narrower, launch_online)

        def sums(tile: Tile) -> RowSums:
            stats = (student_stats, teacher_stats)
            return row_sums(student, teacher, *stats, Divergence.JSD, 0.5, vocab_size, tile)

        def launch_sums(tile: Tile) -> Sequence[Tensor]:
            result = sums(tile)
            return result.f, result.h

        self.gradients(sums(self.search(Sweep.ROW_SUMS, self.narrower, launch_sums)))

    def row_stats(self, side: Operand) -> RowStats:
        """Tune sweep 1 for one model, and return what it finds."""

        def launch(tile: Tile) -> Sequence[Tensor]:
            result = row_stats(side, self.vocab_size, tile)
            return result.maximum, result.log_sum

        tile = self.search(Sweep.ROW_STATS, side.x.shape[1], launch)
        return row_stats(side, self.vocab_size, tile)

    def gradients(self, sums: RowSums) -> None:
        """Tune sweep 3."""
        student, teacher, vocab_size = self.student, self.teacher, self.vocab_size
        weight = torch.ones(student.tokens, device=self.device)
        # All candidates' blocks divide the columns.
        unit = max(v for _, v in trials.BLOCKS_NV)
        limit = max(1, WORKSPACE_BYTES // (student.tokens * self.dtype.itemsize * unit))
        shape = (student.tokens, unit * min(limit, math.ceil(vocab_size / unit)))

        def launch(tile: Tile) -> Sequence[Tensor]:
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
            gradient_chunk(
                student, teacher, sums, weight, None, Divergence.JSD, 0.5, vocab_size, 0, out, tile
            )
            return (out[:, :vocab_size],)

        # The results are rounded to the dtype of the operands.
        tolerance = max(TOLERANCE, 4 * torch.finfo(self.dtype).eps)
        self.search(Sweep.GRADIENTS, self.narrower, launch, tolerance)

    def search(
        self, sweep: Sweep, width: int, launch: Launch, tolerance: float = TOLERANCE
    ) -> Tile:
        """Time the tiles of a sweep, store the best one, and return it."""
        for known in self.outcomes:
            if (known.sweep, known.width) == (sweep, width):
                return known.best
        heuristic = tiles.choose(sweep, self.arch, self.dtype, width)
        outcome = Outcome(sweep, width, heuristic)
        others = trials.candidates(sweep, self.arch, self.dtype.itemsize)
        order = list(dict.fromkeys([heuristic, *others]))
        truth: Sequence[Tensor] | None = None
        for number, tile in enumerate(order, 1):
            try:
                with trials.nan_in_new_tensors():
                    results = launch(tile)
                reason = trials.difference(results, truth or results, tolerance)
                if reason is None:
                    truth = truth or results
                    outcome.times[tile] = self.timer(partial(launch, tile))
            except Exception as error:
                reason = trials.rejection(error)
                if reason is None:
                    raise
            if reason is not None:
                outcome.rejected[tile] = reason
            said = f"rejected, {reason}" if reason else f"{outcome.times[tile]:.3f} ms"
            progress = f"{sweep.value}, width {width}, {number} of {len(order)}"
            self.say(f"{progress}: {describe(tile)}: {said}")
        if not outcome.times:
            reason = outcome.rejected[heuristic]
            raise RuntimeError(f"no tile of {sweep.value} runs here; the usual one: {reason}")
        name = tuned.device_name(self.device)
        entry = tuned.Entry(name, triton.__version__, sweep, self.dtype, width, outcome.best)
        tuned.save(self.path, entry)
        self.outcomes.append(outcome)
        return outcome.best


def _side(
    tokens: int, vocab_size: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> Operand:
    def random(rows: int, scale: float) -> Tensor:
        shape, device = (rows, width), generator.device
        return aligned(torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype))

    # Lenses that are neither flat nor one-hot.
    head = random(vocab_size, 1.5 / math.sqrt(width))
    return Operand(random(tokens, 1.0), head, None, 1.0, None, 1.0)


def describe(tile: Tile) -> str:
    """Return a tile in a few characters."""
    blocks = f"{tile.block_n}x{tile.block_v}x{tile.block_k}"
    return f"{blocks}, {tile.warps} warps, {tile.stages} stages"
