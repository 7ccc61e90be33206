"""The peak memory of a function, measured in a real run, or counted over fake tensors.

On a CPU, the profiler records every allocation and release of PyTorch's CPU allocator: in C++, in
custom operators and in compiled code. It misses the buffers that a BLAS library allocates itself.
On a GPU, CUDA's counters are read.

A run over fake tensors allocates nothing. ``StorageTracker`` adds the sizes of the storages that
operators create, and subtracts them when the storages are freed. The tests compare measured and
counted memory.
"""

from __future__ import annotations

import gc
import itertools
import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.support import compat
from lens_kernels.compat import tensors_in

MIB = 1 << 20

# Without KINETO_LOG_LEVEL, the profiler writes a message to stderr at every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Memory:
    """The memory that a function takes in bytes, beyond the memory in use before.

    ``peak`` is the maximum during the run. ``kept`` is the memory at the end, for the loss and the
    gradients.
    """

    peak: int
    kept: int

    def columns(self) -> dict[str, str]:
        """Return ``peak`` and ``kept`` as columns of a CSV, in MiB."""
        return {"peak_with_gradients_mib": mib(self.peak), "gradients_mib": mib(self.kept)}


def mib(size: float) -> str:
    """Return a number of bytes as a text in MiB."""
    return f"{size / MIB:.2f}"


def measure(function: Callable[[], Any], device: torch.device) -> Memory:
    """Run ``function`` and measure its memory. The kept memory includes its result."""
    if device.type == "cuda":
        return _measure_cuda(function, device)
    if device.type != "cpu":
        raise ValueError(f"memory can be measured on cpu and cuda, got {device.type!r}")
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _no_collection(), profiler:
        result = function()
    sizes = compat.allocations(profiler)
    if not sizes:
        raise RuntimeError(f"the profiler of torch {torch.__version__} recorded no allocation")
    live = [*itertools.accumulate(sizes)]
    del result
    return Memory(max(0, *live), live[-1])


def _measure_cuda(function: Callable[[], Any], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with _no_collection():
        result = function()
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    kept = torch.cuda.memory_allocated(device) - before
    del result
    return Memory(peak, kept)


class StorageTracker(compat.DispatchMode):
    """A mode that counts the bytes of the storages that operators create.

    Views and in-place results share a storage that is already counted. If a storage first appears
    as an argument, it existed before, and is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count the storages of its results."""
        kwargs = kwargs or {}
        self._see((args, kwargs), created=False)
        if body := compat.body_of(func):
            # The mode does not see inside a custom operator, and with fake tensors torch does not
            # run the operator's body. So the body runs here, to count its allocations.
            with self:
                result = body(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self._see(result, created=True)
        return result

    def _see(self, tree: Any, created: bool) -> None:
        for x in tensors_in(tree):
            storage = x.untyped_storage()
            if (key := id(storage)) in self._sizes:
                continue
            self._sizes[key] = storage.nbytes() if created else 0
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            # torch has one Python object for each storage, which exists as long as the storage.
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def track(function: Callable[[], Any]) -> Memory:
    """Run ``function`` under the tracker, with real or fake tensors."""
    with _no_collection(), StorageTracker() as tracker:
        result = function()
    memory = Memory(tracker.peak, tracker.live)
    del result
    return memory


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def available() -> int:
    """Return the available bytes of main memory."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        text = ""
    found = re.search(r"^MemAvailable:\s*(\d+)", text, re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
