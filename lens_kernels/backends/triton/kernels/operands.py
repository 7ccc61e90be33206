"""The inputs of the sweeps: a model's hidden states and head, and the log-sum-exp of each row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lens_kernels.divergence import FLOOR
from lens_kernels.lens import LensHead

# Widths and strides are multiples of 16 elements, so that Triton can vectorise loads.
ALIGNMENT = 16
# How many rows of the head ``logits_at`` copies at a time.
GATHERED = 1024


@dataclass(frozen=True, eq=False)
class Operand:
    """Rows ``x`` ``(N, D)`` and head ``weight`` ``(V, D)`` in one dtype, and the map to logits.

    Each row is padded with zeros to a multiple of 16 elements. Row strides are multiples of 16 too.
    If ``temperatures`` ``(N,)`` are given, each row has a temperature of its own, and
    ``temperature`` is 1.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float
    temperatures: Tensor | None = None

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
        x, w, own = self.x, self.weight, self.temperatures
        return x, w, self.bias, padded(x.shape[1]), x.stride(0), w.stride(0), slope, cap, own

    def logits_at(self, columns: Tensor) -> Tensor:
        """Return the logits of each row at its own ``columns``, both ``(N, K)``, in fp32."""
        rows = max(1, GATHERED // columns.shape[1])
        pieces = zip(self.x.split(rows), columns.split(rows), strict=True)
        z = torch.cat([(x[:, None].float() * self.weight[at].float()).sum(-1) for x, at in pieces])
        if self.bias is not None:
            z = z + self.bias[columns]
        head = LensHead(self.weight, scale=self.scale, softcap=self.softcap)
        logits = head.logits(z, self.temperature)[0].clamp(min=FLOOR)
        return logits if self.temperatures is None else logits / self.temperatures[:, None]

    def untempered(self) -> Operand:
        """Return the same operand with temperature 1."""
        return replace(self, temperature=1.0, temperatures=None)


@dataclass(frozen=True, eq=False)
class RowStats:
    """The log-sum-exp of each row as two numbers, ``(N,)``: the maximum and the log of the sum.

    A single fp32 number near 60 would cause an error of 4e-6 in every probability. If requested,
    ``entropy`` is that of the softmax, and ``mean`` is the mean of the log-probabilities.
    """

    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor | None = None
    mean: Tensor | None = None

    @classmethod
    def merged(cls, maximum: Tensor, total: Tensor, moment: Tensor | None = None) -> RowStats:
        """Merge the results of parts of the vocabulary, ``(S, N)`` each.

        For the logits ``u`` of a part, ``total`` is the sum of ``exp(u - maximum)``, and ``moment``
        is the sum of ``exp(u - maximum) (u - maximum)``.
        """
        highest = maximum.amax(0)
        below = maximum - highest
        parts = total * torch.exp(below)
        whole = parts.sum(0)
        stats = cls(highest, whole.log())
        if moment is None:
            return stats
        moments = (moment + below * total) * torch.exp(below)
        return replace(stats, entropy=stats.log_sum - moments.sum(0) / whole)

    def log_probability(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities of ``logits`` ``(N, K)`` of the same rows."""
        return (logits - self.maximum[:, None]) - self.log_sum[:, None]

    def arguments(self) -> tuple[Tensor, Tensor]:
        """Return the log-sum-exps as an argument of ``load_stats``."""
        return self.maximum, self.log_sum


@dataclass(frozen=True, eq=False)
class RowSums:
    """Each row's sums of ``f`` and ``h`` over the vocabulary, ``(N,)``, and both log-sum-exps.

    ``moment`` is the sum of ``h log q``, if requested.
    """

    f: Tensor
    h: Tensor
    student: RowStats
    teacher: RowStats
    moment: Tensor | None = None

    def sum_with_log_q(self) -> Tensor:
        """Return the sum of ``G log q`` with ``G = h - q sum(h)``."""
        assert self.moment is not None and self.student.entropy is not None
        return self.moment + self.h * self.student.entropy


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
