"""The inputs of the sweeps: a model's hidden states and head, and the log-sum-exp of each row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lens_kernels.lens import LensHead

# Widths and strides are multiples of 16 elements, so that Triton can vectorise loads.
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Operand:
    """Rows ``x`` ``(N, D)`` and head ``weight`` ``(V, D)`` in one dtype, and the map to logits.

    Each row is padded with zeros to a multiple of 16 elements. Row strides are multiples of 16 too.
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
        """Return the precision of fp32 GEMMs, as torch's settings state."""
        nvidia = self.x.device.type == "cuda" and torch.version.hip is None
        return "tf32" if nvidia and tf32_is_allowed() else "ieee"

    def arguments(self) -> tuple[Any, ...]:
        """Return the operand as an argument of ``logits_tile``."""
        slope = self.scale / self.temperature
        cap = None if self.softcap is None else self.softcap / self.temperature
        x, w = self.x, self.weight
        return x, w, self.bias, padded(x.shape[1]), x.stride(0), w.stride(0), slope, cap

    def logits_at(self, columns: Tensor) -> Tensor:
        """Return one logit of each row, at the row's own column, ``(N,)`` in fp32."""
        pieces = zip(self.x.split(1024), columns.split(1024), strict=True)
        z = torch.cat([(x.float() * self.weight[at].float()).sum(-1) for x, at in pieces])
        if self.bias is not None:
            z = z + self.bias[columns]
        head = LensHead(self.weight, scale=self.scale, softcap=self.softcap)
        return head.logits(z, self.temperature)[0]

    def untempered(self) -> Operand:
        """Return the same operand with temperature 1."""
        return replace(self, temperature=1.0)


@dataclass(frozen=True, eq=False)
class RowStats:
    """The log-sum-exp of each row as two numbers, ``(N,)``: the maximum and the log of the sum.

    A single fp32 number near 60 would cause an error of 4e-6 in every probability.
    """

    maximum: Tensor
    log_sum: Tensor

    @classmethod
    def merged(cls, maximum: Tensor, total: Tensor) -> RowStats:
        """Merge the maxima and sums of exponentials of parts of the vocabulary, ``(S, N)`` each."""
        highest = maximum.amax(0)
        return cls(highest, (total * torch.exp(maximum - highest)).sum(0).log())

    def arguments(self) -> tuple[Tensor, Tensor]:
        """Return the log-sum-exps as an argument of ``load_stats``."""
        return self.maximum, self.log_sum


@dataclass(frozen=True, eq=False)
class RowSums:
    """Each row's sums of ``f`` and ``h`` over the vocabulary, ``(N,)``, and both log-sum-exps."""

    f: Tensor
    h: Tensor
    student: RowStats
    teacher: RowStats


def tf32_is_allowed() -> bool:
    """Return whether torch's settings allow TF32 in fp32 GEMMs.

    torch 2.9 added a second setting. After its first use, reading the older setting raises an
    error.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def padded(width: int) -> int:
    """Return the width of a row including its padding."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def aligned(x: Tensor) -> Tensor:
    """Return ``x``, padded as ``Operand`` documents. ``x`` is copied only if necessary."""
    width = x.shape[1]
    if width % ALIGNMENT:
        return F.pad(x, (0, padded(width) - width))[:, :width]
    return x if x.stride(1) == 1 and x.stride(0) % ALIGNMENT == 0 else x.contiguous()
