"""Tile sizes: what a kernel may use, and what it uses on which device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from lens_kernels.backends.triton.interpreter import INTERPRETING


class Sweep(str, Enum):
    """The kernels that have a tile, each with the number of fp32 accumulators it holds."""

    ROW_STATS = "row_stats"
    ONLINE_KL = "online_kl"
    ROW_SUMS = "row_sums"
    GRADIENTS = "gradients"

    @property
    def accumulators(self) -> int:
        """Return how many tiles of logits are alive at a time."""
        return 1 if self is Sweep.ROW_STATS else 2


@dataclass(frozen=True)
class Tile:
    """Tokens, vocabulary entries and widths of one step, and how a GPU runs it."""

    block_n: int
    block_v: int
    block_k: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        """Return the kernels' own arguments."""
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v, "BLOCK_K": self.block_k}

    def options(self) -> dict[str, Any]:
        """Return the compiler's options."""
        # Fusing products and sums is no longer the default from Triton 3.10 on.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Arch:
    """What bounds a tile on one kind of device: bytes of shared memory, and registers."""

    name: str
    shared_memory: int
    threads_per_warp: int = 32
    # fp32 accumulators that a thread can hold beside what else it needs.
    accumulators_per_thread: int = 128


ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 166912),
        Arch("sm_89", 101376),  # also sm_86 and sm_120
        Arch("sm_90", 232448),
        Arch("sm_100", 232448),
        Arch("gfx942", 65536, threads_per_warp=64),
        Arch("interpreter", 1 << 40, accumulators_per_thread=1 << 40),
    )
}

# Hidden size from which a sweep is bound by its products even with one program to a processor.
WIDE = 2048


def _tile(sweep: Sweep, arch: str, dtype: torch.dtype, width: int, rich: bool) -> Tile:
    """Return a tile that ``benchmarks/kernel_report.py`` has compiled, and found not to spill."""
    stats, sums = sweep is Sweep.ROW_STATS, sweep is Sweep.ROW_SUMS
    wide = width >= WIDE
    if arch == "interpreter":
        # Wide operands, as exact heads of tests have, would take minutes in small steps.
        return Tile(32, 64, 16, 4, 1) if width < 256 else Tile(64, 512, 512, 4, 1)
    if dtype.itemsize == 4:
        # Exact products take no matrix instruction on NVIDIA, and many registers.
        return Tile(64, 32, 32, 8, 3) if sums else Tile(128 if stats else 64, 64, 16, 8, 3)
    if arch in ("sm_80", "sm_89"):
        narrow = sums or sweep is Sweep.ONLINE_KL or (rich and not stats)
        return Tile(64 if narrow else 128, 128, 32, 8, 4 if arch == "sm_80" else 3)
    if arch == "gfx942":
        return Tile(128, 128, 32, 8, 2) if stats else Tile(128, 64, 32, 8, 2)
    if arch == "sm_100":
        return Tile(64 if sums and rich else 128, 128 if stats else 64, 64, 8, 3)
    if stats:
        return Tile(128, 256 if wide and not rich else 128, 64, 8, 3)
    if wide and not sums and not rich:
        return Tile(128, 128, 64, 8, 3)
    return Tile(64, 128, 64, 8, 3)


def objection(tile: Tile, sweep: Sweep, arch: Arch, itemsize: int) -> str | None:
    """Say why a tile cannot be used, or return None; the compiler may still reject it."""
    sizes = (tile.block_n, tile.block_v, tile.block_k)
    if any(size < 16 or size & (size - 1) for size in sizes):
        return f"block sizes must be powers of two from 16, got {sizes}"
    if tile.warps not in (1, 2, 4, 8, 16) or tile.stages < 1:
        return f"warps must be a power of two up to 16 and stages at least 1, got {tile}"
    shared = tile.stages * (tile.block_n + tile.block_v) * tile.block_k * itemsize
    if shared > arch.shared_memory:
        return f"it needs {shared} bytes of shared memory, {arch.name} has {arch.shared_memory}"
    threads = tile.warps * arch.threads_per_warp
    each = sweep.accumulators * tile.block_n * tile.block_v // threads
    if each > arch.accumulators_per_thread:
        return f"{each} accumulators a thread would not fit into its registers"
    return None


def choose(sweep: Sweep, arch: Arch, dtype: torch.dtype, width: int, rich: bool = False) -> Tile:
    """Return the tile of a sweep over operands of this dtype, the narrower of them this wide.

    ``rich`` says whether a head has a bias or a softcap, or tokens have labels: all take registers.
    """
    tile = _tile(sweep, arch.name, dtype, width, rich)
    reason = objection(tile, sweep, arch, dtype.itemsize)
    assert reason is None, reason
    return tile


def arch_of(device: torch.device) -> Arch:
    """Return what bounds tiles on a device."""
    if INTERPRETING:
        return ARCHS["interpreter"]
    if torch.version.hip is not None:
        return ARCHS["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    name = {8: "sm_89" if minor else "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_89")
    return ARCHS[name]
