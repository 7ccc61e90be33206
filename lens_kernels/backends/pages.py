"""Buffers on a CPU without the price of new memory: Linux clears every page at its first touch.

At 1024 tokens and 50257 entries that was 90 to 190 thousand pages of 4 KiB in a call, up to an
eighth of its time (2 cores). Both functions are requests, which other systems do not know.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
# glibc's malloc maps larger blocks than this one by one, and gives them back when they are freed.
LARGEST_KEPT = 31 << 20


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def in_huge_pages(x: Tensor) -> Tensor:
    """Return ``x``, whose memory nothing was written to yet, to be mapped by pages of 2 MiB."""
    madvise = _madvise()
    # A tensor of a subclass may have no memory.
    if madvise is None or x.device.type != "cpu" or type(x) is not Tensor:
        return x
    start = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (x.data_ptr() + x.nbytes) // HUGE_PAGE * HUGE_PAGE
    if end > start:  # whole pages of its own
        madvise(start, end - start, mmap.MADV_HUGEPAGE)
    return x


@functools.cache
def keep_freed_blocks() -> None:
    """Let malloc keep what is freed for the next block of that size.

    glibc's keeps as much as twice the largest block that it has seen come back, up to a limit, so
    it is shown one. Where it has seen little, the temporaries that compiled code makes for every
    block of rows are new to the process every time.
    """
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)
