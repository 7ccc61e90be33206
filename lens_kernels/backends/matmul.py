"""The three GEMMs of a lens. They accumulate and return fp32, or fp64 for fp64 operands."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# The number of vocabulary entries that a GEMM on a CPU handles at a time. With 768 entries MKL
# reaches 175 GFLOP/s, and only 120 with the whole vocabulary (2 cores, 256 to 512 rows, hidden size
# 576 to 1600).
CPU_VOCAB_TILE = 768
HALF = (torch.float16, torch.bfloat16)


def multiplies_natively(dtype: torch.dtype, result: torch.dtype, device: torch.device) -> bool:
    """Return whether the device has GEMMs of ``dtype`` matrices with a ``result`` output."""
    if dtype not in HALF or result is not torch.float32:
        return False
    if device.type == "cpu":
        return dtype is torch.bfloat16 and _has_amx()
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def _has_amx() -> bool:
    """Return whether the CPU has AMX for bfloat16, and torch has a setting to use it.

    Vector instructions for bfloat16 would give only 200 GFLOP/s instead of 190. Before version
    2.13, torch neither has the setting nor reports what the CPU supports.
    """
    onednn = torch.backends.mkldnn
    can_be_told = onednn.is_available() and hasattr(onednn, "matmul")
    if not (can_be_told and hasattr(torch.cpu, "get_capabilities")):
        return False
    return torch.cpu.get_capabilities().get("amx_bf16", False)


# The lock prevents one thread from resetting oneDNN's precision while another thread needs it.
_lock = threading.Lock()
# The user's precision for oneDNN while this module has replaced it, otherwise None.
_users: str | None = None


def _multiply(dtype: torch.dtype, gemms: Callable[[], None]) -> None:
    """Run float32 GEMMs, with bfloat16 instructions if ``dtype`` is bfloat16.

    On a CPU, torch has no GEMM of bfloat16 matrices with a float32 result. A oneDNN setting makes
    float32 GEMMs round their inputs to bfloat16, which does not change inputs that came from
    bfloat16. The setting is global: float32 GEMMs of other threads are also rounded meanwhile.

    This is not a context manager: an interrupt before its body would leave the setting changed.
    """
    global _users
    if dtype is not torch.bfloat16:
        gemms()
        return
    with _lock:
        try:
            _users = _onednn().fp32_precision
            _onednn().fp32_precision = "bf16"
            gemms()
        finally:
            try:
                _restore()
            finally:  # an interrupt may have stopped _restore
                _restore()


def _restore() -> None:
    global _users
    if _users is not None:
        _onednn().fp32_precision = "none"  # "none" makes oneDNN use torch's general setting
        if _onednn().fp32_precision != _users:
            _onednn().fp32_precision = _users
        _users = None


def _onednn() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _start_in_child() -> None:
    """Create a new lock and restore oneDNN's precision in a forked process.

    The child process has no copy of the thread that held the lock.
    """
    global _lock
    _lock = threading.Lock()
    _restore()


if hasattr(os, "register_at_fork"):  # Windows cannot fork processes
    os.register_at_fork(after_in_child=_start_in_child)


class Factors:
    """A head's weight and rows of hidden states, in the dtypes of the GEMMs.

    Under autocast, weight and hidden states are rounded to ``operand_dtype``. Autocast never
    changes float64. If the device has no GEMM for a 16-bit weight, tiles of the weight are
    converted to fp32.
    """

    def __init__(
        self, weight: Tensor, operand_dtype: torch.dtype | None, compute: torch.dtype
    ) -> None:
        self.rounded_to = None if weight.dtype is torch.float64 else operand_dtype
        self.weight = _rounded(weight, self.rounded_to)
        native = multiplies_natively(self.weight.dtype, compute, weight.device)
        self.dtype = self.weight.dtype if native else compute

    def rows(self, x: Tensor) -> Tensor:
        """Return rows of hidden states in the dtype of the GEMMs."""
        return _rounded(x, self.rounded_to).to(self.dtype)


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def _tiles(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    rows = matrix.shape[0]
    step = max(1, min(rows, CPU_VOCAB_TILE) if matrix.device.type == "cpu" else rows)
    # Memory that is allocated anew for each tile can take several times as long as the copy.
    wide = None if matrix.dtype is dtype else torch.empty_like(matrix[:step], dtype=dtype)
    for start in range(0, rows, step):
        span = slice(start, start + step)
        part = matrix[span]
        yield span, part if wide is None else wide[: part.shape[0]].copy_(part)


def _has_out_dtype(factor: Tensor) -> bool:
    """Return whether ``torch.mm`` can multiply this 16-bit matrix with a float32 result."""
    return factor.dtype in HALF and factor.device.type == "cuda"


def project(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Set ``out = x @ weight.T``. Get ``x`` from ``Factors.rows``."""
    if _has_out_dtype(x):
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
        return

    def gemms() -> None:
        rows = x.to(out.dtype)
        for columns, part in _tiles(weight, out.dtype):
            torch.mm(rows, part.t(), out=out[:, columns])

    _multiply(x.dtype, gemms)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``. ``a`` has the dtype of ``Factors.rows``."""
    if _has_out_dtype(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype is b.dtype and a.dtype not in HALF:
        return torch.mm(a, b)
    result = torch.promote_types(a.dtype, torch.float32)
    out = a.new_zeros(a.shape[0], b.shape[1], dtype=result)

    def gemms() -> None:
        for (_, left), (_, right) in zip(_tiles(a.t(), result), _tiles(b, result), strict=True):
            out.addmm_(left.t(), right)

    _multiply(a.dtype, gemms)
    return out


def add_head_gradient(grad: Tensor, x: Tensor, out: Tensor, begun: bool) -> None:
    """Add ``grad.T @ x`` to ``out``, or overwrite ``out`` unless ``begun``.

    ``grad`` has the dtype of ``x``.
    """
    if _has_out_dtype(x):
        if begun:
            torch.addmm(out, grad.t(), x, out_dtype=out.dtype, out=out)
        else:
            torch.mm(grad.t(), x, out_dtype=out.dtype, out=out)
        return

    def gemms() -> None:
        wide = x.to(out.dtype)
        for rows, part in _tiles(grad.t(), out.dtype):
            if begun:
                out[rows].addmm_(part, wide)
            else:
                torch.mm(part, wide, out=out[rows])

    _multiply(x.dtype, gemms)
