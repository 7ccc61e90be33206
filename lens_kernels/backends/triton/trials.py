"""What a tile goes through before it is timed: it must compile, launch, and be right."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from lens_kernels.backends.triton.tiles import Arch, Sweep, Tile, objection

BLOCKS_NV = ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128))
BLOCKS_K, WARPS, STAGES = (32, 64), (4, 8), (2, 3, 4)
# With fewer accumulators for each thread, loading operands takes longer than multiplying them.
FEWEST_ACCUMULATORS = 64

REJECTIONS = (OutOfResources, PTXASError, CompilationError)
# What the compiler's passes and the driver say of a tile in errors that have no class of their own.
REJECTING_MESSAGES = ("PassManager::run failed", "too many resources requested")


def candidates(sweep: Sweep, arch: Arch, itemsize: int) -> list[Tile]:
    """Return the tiles that are worth a try."""
    found = []
    for (n, v), k, warps, stages in itertools.product(BLOCKS_NV, BLOCKS_K, WARPS, STAGES):
        tile = Tile(n, v, k, warps, stages)
        accumulators = sweep.accumulators * n * v // (warps * arch.threads_per_warp)
        if accumulators >= FEWEST_ACCUMULATORS and not objection(tile, sweep, arch, itemsize):
            found.append(tile)
    return found


def rejection(error: Exception) -> str | None:
    """Return why a tile was rejected, or None if the error says something else."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, REJECTIONS):
        return f"{type(error).__name__}: {lines[-1].strip()}"
    if isinstance(error, RuntimeError) and any(text in str(error) for text in REJECTING_MESSAGES):
        return lines[-1].strip()
    return None


def difference(results: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> str | None:
    """Say how far results are from the truth if that is too far; this waits for the GPU."""
    for result, true in zip(results, truth, strict=True):
        error = (result - true).abs().max().item() / max(true.abs().max().item(), 1e-30)
        if not error <= tolerance:
            return f"its results are off by {error:.1e} of the largest"
    return None


@contextlib.contextmanager
def nan_in_new_tensors() -> Iterator[None]:
    """Fill new tensors with NaN: memory may hold the right results of the tile before."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
