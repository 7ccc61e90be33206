"""The three matrix products of a lens, always accumulated and returned in fp32 (fp64 for fp64)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Columns of the head that one product covers on a CPU. MKL reaches 175 GFLOP/s on tiles of this
# width and 120 on the whole vocabulary at once (2 cores, 256 to 512 rows, hidden size 576 to 1600).
CPU_VOCAB_TILE = 768
HALF = (torch.float16, torch.bfloat16)


def multiplies_natively(dtype: torch.dtype, result: torch.dtype, device: torch.device) -> bool:
    """Say whether the device multiplies such operands into such a result without rounding it."""
    pair = dtype in HALF and result is torch.float32
    return pair and device.type == "cuda" and torch.version.hip is None


class Factors:
    """A head's weight and rows of hidden states, as their product takes them.

    Both are rounded to ``operand_dtype`` where autocast asks for it; float64 it leaves alone, as
    everywhere in torch. A 16-bit weight stays one where the device cannot multiply it: it is
    widened tile by tile.
    """

    def __init__(
        self, weight: Tensor, operand_dtype: torch.dtype | None, compute: torch.dtype
    ) -> None:
        self.rounded_to = None if weight.dtype is torch.float64 else operand_dtype
        self.weight = _rounded(weight, self.rounded_to)
        native = multiplies_natively(self.weight.dtype, compute, weight.device)
        self.dtype = self.weight.dtype if native else compute

    def rows(self, x: Tensor) -> Tensor:
        """Return hidden states as a factor."""
        return _rounded(x, self.rounded_to).to(self.dtype)


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tiles of a weight, each in the same memory where the dtype is another one."""
    rows = weight.shape[0]
    step = max(1, min(rows, CPU_VOCAB_TILE) if weight.device.type == "cpu" else rows)
    # Memory that is new for each tile can cost several times the copy.
    wide = None if weight.dtype is dtype else weight.new_empty(step, weight.shape[1], dtype=dtype)
    for start in range(0, rows, step):
        columns = slice(start, start + step)
        part = weight[columns]
        yield columns, part if wide is None else wide[: part.shape[0]].copy_(part)


def project(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Set ``out = x @ weight.T``; ``x`` is in the dtype of the product."""
    if x.dtype in HALF:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
        return
    for columns, part in _tiles(weight, x.dtype):
        torch.mm(x, part.t(), out=out[:, columns])


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``; ``a`` is in the dtype of the product."""
    if a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype is b.dtype:
        return torch.mm(a, b)
    out = a.new_zeros(a.shape[0], b.shape[1])
    for rows, part in _tiles(b, a.dtype):
        out.addmm_(a[:, rows], part)
    return out


def add_head_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """Add ``grad.T @ x`` to ``out``; ``grad`` is in the dtype of ``x``."""
    if x.dtype in HALF:
        torch.addmm(out, grad.t(), x, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(grad.t(), x)
