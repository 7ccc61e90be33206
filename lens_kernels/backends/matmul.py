"""The three matrix products of a lens, always accumulated and returned in fp32 (fp64 for fp64)."""

from __future__ import annotations

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


def as_operand(x: Tensor, rounded_to: torch.dtype | None, operand: torch.dtype) -> Tensor:
    """Return ``x`` as a factor: rounded as autocast asks, then in the dtype of the product."""
    return (x if rounded_to is None else x.to(rounded_to)).to(operand)


def project(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Set ``out = x @ weight.T``."""
    if x.dtype in HALF:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    elif x.device.type == "cpu":
        for start in range(0, weight.shape[0], CPU_VOCAB_TILE):
            columns = slice(start, start + CPU_VOCAB_TILE)
            torch.mm(x, weight[columns].t(), out=out[:, columns])
    else:
        torch.mm(x, weight.t(), out=out)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``; both are in the same dtype."""
    if b.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def add_head_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """Add ``grad.T @ x`` to ``out``; ``grad`` is in the dtype of ``x``."""
    if x.dtype in HALF:
        torch.addmm(out, grad.t(), x, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(grad.t(), x)
