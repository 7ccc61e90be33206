"""The default tile of every sweep on each kind of GPU, and the limits that every tile must meet."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from lens_kernels.backends.triton.interpreter import INTERPRETING
from lens_kernels.backends.triton.kernels.launch import Tile


class Sweep(str, Enum):
    """The sweeps. Each has a tile of its own."""

    ROW_STATS = "row_stats"
    ONLINE_KL = "online_kl"
    ROW_SUMS = "row_sums"
    GRADIENTS = "gradients"

    @property
    def accumulators(self) -> int:
        """The number of fp32 tiles of logits that a program holds at a time."""
        return 1 if self is Sweep.ROW_STATS else 2


@dataclass(frozen=True)
class Arch:
    """The limits of tiles on one kind of GPU: shared memory in bytes, and accumulators."""

    name: str
    shared_memory: int
    threads_per_warp: int = 32
    # The number of fp32 accumulators that a thread's registers can hold beside its other values.
    accumulators_per_thread: int = 128


ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 166912),
        Arch("sm_89", 101376),  # the limits of sm_89 also hold for sm_86 and sm_120
        Arch("sm_90", 232448),
        Arch("sm_100", 232448),
        Arch("gfx942", 65536, threads_per_warp=64),
        Arch("interpreter", 1 << 40, accumulators_per_thread=1 << 40),
    )
}

# From hidden size 2048 on, GEMMs take most of the time, even with one program per multiprocessor.
WIDE = 2048


def default(sweep: Sweep, arch: Arch, dtype: torch.dtype, width: int, extras: bool = False) -> Tile:
    """Return a sweep's default tile. ``width`` is the smaller hidden size of its operands.

    ``extras`` is true if there is a bias, a softcap or labels, which all take registers.
    ``benchmarks/kernel_report.py`` shows that no default tile spills registers.
    """
    stats, sums = sweep is Sweep.ROW_STATS, sweep is Sweep.ROW_SUMS
    wide, name = width >= WIDE, arch.name
    if name == "interpreter":
        # In the interpreter an operation takes the same time for any block size, so large blocks
        # are faster. Small problems get smaller blocks, so that tests still run several tiles.
        return Tile(64, 128, 16, 4, 1) if width < 256 else Tile(64, 512, 512, 4, 1)
    if dtype.itemsize == 4:
        # GPUs of NVIDIA multiply exact fp32 without matrix instructions, which takes many
        # registers. On the older ones, TF32 with a bias and a softcap takes too many as well.
        large = stats and not (extras and name in ("sm_80", "sm_89"))
        return Tile(64, 32, 32, 8, 3) if sums else Tile(128 if large else 64, 64, 16, 8, 3)
    if name in ("sm_80", "sm_89"):
        narrow = sums or sweep is Sweep.ONLINE_KL or (extras and not stats)
        return Tile(64 if narrow else 128, 128, 32, 8, 4 if name == "sm_80" else 3)
    if name == "gfx942":
        return Tile(128, 128, 32, 8, 2) if stats else Tile(128, 64, 32, 8, 2)
    if name == "sm_100":
        return Tile(64 if sums and extras else 128, 128 if stats else 64, 64, 8, 3)
    if stats:
        return Tile(128, 256 if wide and not extras else 128, 64, 8, 3)
    if wide and not sums and not extras:
        return Tile(128, 128, 64, 8, 3)
    return Tile(64, 128, 64, 8, 3)


def invalid_reason(tile: Tile, sweep: Sweep, arch: Arch, itemsize: int) -> str | None:
    """Return the reason why a tile cannot be used, or None.

    The compiler may still reject a tile.
    """
    sizes = (tile.block_n, tile.block_v, tile.block_k)
    if any(size < 16 or size & (size - 1) for size in sizes):
        return f"block sizes must be powers of two, at least 16, got {sizes}"
    if tile.warps not in (1, 2, 4, 8, 16) or tile.stages < 1:
        return f"warps must be 1, 2, 4, 8 or 16, and stages at least 1, got {tile}"
    shared = tile.stages * (tile.block_n + tile.block_v) * tile.block_k * itemsize
    if shared > arch.shared_memory:
        return f"{tile} needs {shared} bytes of shared memory; {arch.name} has {arch.shared_memory}"
    threads = tile.warps * arch.threads_per_warp
    per_thread = sweep.accumulators * tile.block_n * tile.block_v // threads
    if per_thread > arch.accumulators_per_thread:
        return f"{tile} needs {per_thread} accumulators per thread, too many for its registers"
    return None


def arch_of(device: torch.device) -> Arch:
    """Return the limits of tiles on a device."""
    if INTERPRETING:
        return ARCHS["interpreter"]
    if torch.version.hip is not None:
        return ARCHS["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    name = {8: "sm_89" if minor else "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_89")
    return ARCHS[name]
