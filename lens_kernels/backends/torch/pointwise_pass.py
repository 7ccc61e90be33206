"""The pass in torch, compiled if that saves time. The gradient overwrites the student's tile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens_kernels import divergence as table
from lens_kernels.backends import compiled
from lens_kernels.backends.head_products import ColumnStatistics
from lens_kernels.backends.pages import keep_freed_blocks
from lens_kernels.backends.torch.layout import bytes_per_row, in_place
from lens_kernels.backends.torch.passes import Terms
from lens_kernels.call import LossCall
from lens_kernels.divergence import FLOOR, Formula, Mixture
from lens_kernels.lens import LensHead, LogitMap

# On a CPU, a call over at least this many pairs of logits compiles the pass. Compiling takes 6 to
# 10 s once per process, or 24 s if the code is not in Inductor's disk cache. It saves 10 to 15 ms
# per million pairs, so compiling pays off after 120 such calls (2 cores). On other devices the pass
# is always compiled, because the eager pass moves several times as many bytes.
CPU_COMPILE_LOGITS = 1 << 23
# How many logits the eager and the compiled pass process at once on a CPU. The temporaries of the
# eager pass, and the tiles of the compiled pass, then stay in the cache.
CPU_EAGER_BLOCK = 1 << 17
CPU_COMPILED_BLOCK = 1 << 20


def softmax(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-softmax and softmax, with one exponential per entry.

    The log-sum-exp is kept as two numbers, the maximum and the log of the sum. A single fp32 number
    near 60 would cause an error of 4e-6 in every probability. Both results use the same rounded
    logarithm. An error that ``log q`` and ``q`` share changes divergences only in second order.
    """
    u = u - u.amax(-1, keepdim=True)
    powers = u.exp()
    log_total = powers.sum(-1, keepdim=True).log()
    return u - log_total, powers * (-log_total).exp()


class Comparison(NamedTuple):
    """The inputs of a divergence from the teacher's products ``zt`` ``(R, V)``.

    ``formula`` is a function, not a name. torch 2.13 does not recompile when an ``Enum`` that
    selects a table entry changes, and would run the first divergence for all. Its numbers are 0-dim
    tensors. torch 2.13 would turn floats into doubles, and CPU loops would spend a sixth of their
    time on converting them.
    """

    zt: Tensor
    weight: Tensor
    student: LogitMap
    teacher: LogitMap
    formula: Formula
    beta: Mixture
    teacher_statistics: Tensor | None = None


class Labels(NamedTuple):
    """The inputs of the cross entropy of labels ``(R,)``. It always uses temperature 1."""

    labels: Tensor
    weight: Tensor
    student: LogitMap


def tile_pass(
    zs: Tensor, comparison: Comparison | None, labels: Labels | None, with_grad: bool
) -> list[Tensor]:
    """Return a list with the divergence, the cross entropy, or both, of each row.

    ``zs`` holds the student's products ``hidden @ weight.T``, ``(R, V)``. With ``with_grad``, the
    gradient of the weighted sum of the results with respect to ``zs`` overwrites it.
    """
    losses, label_grad = [], None
    if labels is not None:
        cross_entropy, label_grad = _cross_entropy(zs, labels, with_grad)
        losses.append(cross_entropy)
    if comparison is not None:
        divergence, grad = _divergence(zs, comparison, with_grad)
        losses.insert(0, divergence)
        if grad is not None:
            zs.copy_(grad)
            if label_grad is not None:
                zs.add_(label_grad)
    elif label_grad is not None:
        zs.copy_(label_grad)
    return losses


def _divergence(zs: Tensor, row: Comparison, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    us, slope = row.student(zs)
    ut, _ = row.teacher(row.zt)
    lq, q = softmax(us.clamp(min=FLOOR))
    ut = ut.clamp(min=FLOOR)
    if row.teacher_statistics is None:
        lp, p = softmax(ut)
    else:
        maximum, log_sum = row.teacher_statistics.split(1, -1)
        lp = (ut - maximum) - log_sum
        p = lp.exp()
    f, h = row.formula(lp, lq, p, q, row.beta)
    loss = f.sum(-1)
    if not with_grad:
        return loss, None
    grad = h - q * h.sum(-1, keepdim=True)
    return loss, grad * (row.weight[:, None] * slope)


def _cross_entropy(zs: Tensor, row: Labels, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    logits, slope = row.student(zs)
    lq, q = softmax(logits.clamp(min=FLOOR))
    cross_entropy = -lq.gather(-1, row.labels[:, None])[:, 0]
    if not with_grad:
        return cross_entropy, None
    columns = torch.arange(zs.shape[-1], device=zs.device)
    residual = q - (columns == row.labels[:, None]).to(lq.dtype)
    return cross_entropy, residual * (row.weight[:, None] * slope)


def is_compiled(device: torch.device, logits: int) -> bool:
    """Return whether a call over this many pairs of logits compiles its pointwise pass."""
    return device.type != "cpu" or logits >= CPU_COMPILE_LOGITS


def block_rows(device: torch.device, compiled: bool, rows: int, vocab_size: int) -> int:
    """Return how many rows of a tile the pass processes at once."""
    if device.type == "cpu":
        limit = CPU_COMPILED_BLOCK if compiled else CPU_EAGER_BLOCK
        return min(rows, max(1, limit // vocab_size))
    # The eager pass needs temporaries as large as its block. The compiled pass needs none.
    return rows if compiled else max(1, rows // 16)


class TorchPass:
    """The pass by torch: eager code, or code compiled by Inductor."""

    def __init__(self, call: LossCall, factor: torch.dtype, tokens: int) -> None:
        compute = call.compute_dtype
        self.call, self.device = call, call.row_weight.device
        columns = call.widest or call.vocab_size  # all ranks of a group need the same layout
        logits = len(call.student_hidden) * tokens * columns
        self.compiled = is_compiled(self.device, logits)
        if self.compiled:
            keep_freed_blocks()
        row_bytes = bytes_per_row(columns, factor, compute)
        self.layout = in_place(tokens, row_bytes, call.workspace_bytes)
        # 1 - beta is computed in fp64, because in fp32 it would lose its digits for a beta near 1.
        beta, rest = (torch.tensor(x, dtype=compute) for x in (call.beta, 1 - call.beta))
        self.beta = beta, rest
        self.student, self.untempered = self.maps(call.student_head)
        self.teacher = None if call.teacher_head is None else self.maps(call.teacher_head)[0]

    def maps(self, head: LensHead) -> list[LogitMap]:
        """Return two maps from a head's products to logits, at the call's temperature and at 1.

        The numbers in the maps are 0-dim tensors.
        """
        head = head.prefix(self.call.vocab_size)
        return [
            as_tensors(head.logit_map(temperature), self.call.compute_dtype)
            for temperature in (self.call.temperature, 1.0)
        ]

    def survey(self) -> ColumnStatistics:
        """Return empty statistics of gradients."""
        return ColumnStatistics(self.compiled)

    def run(
        self,
        tiles: list[Tensor],
        terms: Terms,
        grad: Tensor | None,
        survey: Any,
    ) -> list[Tensor]:
        """Run the pass in blocks of rows. Gradients are surveyed while they are in the cache."""
        step = block_rows(self.device, self.compiled, *tiles[0].shape)
        blocks = []
        for start in range(0, tiles[0].shape[0], step):
            block = slice(start, start + step)
            zs, *terms_of_block = self.arguments(tiles, terms, block)
            arguments = zs, *terms_of_block, grad is not None
            blocks.append(compiled.call(self.compiled, tile_pass, *arguments))
            if survey is not None:
                survey.add(zs)  # the gradient has overwritten zs
        return [torch.cat(losses) for losses in zip(*blocks, strict=True)]

    def arguments(
        self, tiles: list[Tensor], terms: Terms, block: slice
    ) -> tuple[Tensor, Comparison | None, Labels | None]:
        """Return the student's products of a block of rows, and the terms of its rows."""
        # ``data`` drops the link to the base tensor. Otherwise torch would compile a variant for
        # views that cover their whole base.
        zs, *zt = (tile[block].data for tile in tiles)
        comparison = labels = None
        if terms.divergence is not None:
            assert terms.weight is not None and self.teacher is not None
            formula = table.pointwise(terms.divergence, self.call.beta)
            weight = terms.weight[block]
            given = terms.teacher_statistics
            given = None if given is None else given[block]
            comparison = Comparison(
                zt[0], weight, self.student, self.teacher, formula, self.beta, given
            )
        if terms.labels is not None:
            assert terms.label_weight is not None
            weight = terms.label_weight[block]
            labels = Labels(terms.labels[block], weight, self.untempered)
        return zs, comparison, labels


def as_tensors(logit_map: LogitMap, dtype: torch.dtype) -> LogitMap:
    """Return the map with its floats as 0-dim tensors."""
    numbers = {
        name: torch.tensor(value, dtype=dtype)
        for name, value in vars(logit_map).items()
        if isinstance(value, float)
    }
    return replace(logit_map, **numbers)
