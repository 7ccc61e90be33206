"""What the sweeps read: one model's rows and head, and the statistics of its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lens_kernels.lens import LensHead

# Loads are vectorised where widths and strides are multiples of this many elements.
ALIGNED = 16


@dataclass(frozen=True, eq=False)
class Operand:
    """Rows ``x`` ``(N, D)`` and head ``weight`` ``(V, D)`` in one dtype, and the map to logits.

    Rows of both are zeros from their width up to the next multiple of 16, and a stride apart that
    is one.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float

    @property
    def tokens(self) -> int:
        """Return the number of rows."""
        return self.x.shape[0]

    @property
    def precision(self) -> str:
        """Return how fp32 operands are multiplied: as torch has been told to."""
        nvidia = self.x.device.type == "cuda" and torch.version.hip is None
        return "tf32" if nvidia and tf32_is_allowed() else "ieee"

    def arguments(self) -> tuple[Any, ...]:
        """Return what kernels take for a side."""
        slope = self.scale / self.temperature
        cap = None if self.softcap is None else self.softcap / self.temperature
        x, w = self.x, self.weight
        return x, w, self.bias, padded(x.shape[1]), x.stride(0), w.stride(0), slope, cap

    def logits_at(self, columns: Tensor) -> Tensor:
        """Return one logit of every row, in fp32."""
        pieces = zip(self.x.split(1024), columns.split(1024), strict=True)
        z = torch.cat([(x.float() * self.weight[at].float()).sum(-1) for x, at in pieces])
        if self.bias is not None:
            z = z + self.bias[columns]
        head = LensHead(self.weight, scale=self.scale, softcap=self.softcap)
        return head.logits(z, self.temperature)[0]

    def untempered(self) -> Operand:
        """Return the operand at temperature 1."""
        return replace(self, temperature=1.0)


@dataclass(frozen=True, eq=False)
class RowStats:
    """The log-sum-exp of rows in two parts, ``(N,)`` each.

    One fp32 number near 60 would put an error of 4e-6 into every probability.
    """

    maximum: Tensor
    log_sum: Tensor

    def arguments(self) -> tuple[Tensor, Tensor]:
        """Return what kernels take for statistics."""
        return self.maximum, self.log_sum


@dataclass(frozen=True, eq=False)
class RowSums:
    """What sweeps 1 and 2 find of every row, ``(N,)`` each: sums of f and of h, and statistics."""

    f: Tensor
    h: Tensor
    student: RowStats
    teacher: RowStats


def tf32_is_allowed() -> bool:
    """Say whether torch may round the factors of fp32 products, by either of its two switches.

    The older one, the only one before torch 2.9, refuses to be read once the newer one is set.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def padded(width: int) -> int:
    """Return the width up to which rows are read."""
    return -(-width // ALIGNED) * ALIGNED


def aligned(x: Tensor) -> Tensor:
    """Return ``x`` with rows that lie as ``Operand`` wants them, copied only if they do not."""
    width = x.shape[1]
    if width % ALIGNED:
        return F.pad(x, (0, padded(width) - width))[:, :width]
    return x if x.stride(1) == 1 and x.stride(0) % ALIGNED == 0 else x.contiguous()
