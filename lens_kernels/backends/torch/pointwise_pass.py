"""The pass in torch, compiled where that pays: statistics, losses, and the gradient in place."""

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

# A call over at least this many pairs of logits compiles the pass on a CPU. Measured on 2 cores:
# once per process compiling takes 6 to 10 s, 24 if Inductor's cache on disk lacks the code, and it
# then saves 10 to 15 ms per million pairs: in a run of 120 such steps as much as it took. On other
# devices the eager pass is bound by memory traffic, several times that of the compiled one, and the
# pass is always compiled.
CPU_COMPILE_LOGITS = 1 << 23
# Logits of one eager or compiled step on a CPU, so that its temporaries, or its tiles, stay in
# cache.
CPU_EAGER_BLOCK = 1 << 17
CPU_COMPILED_BLOCK = 1 << 20


def softmax(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of softmax and softmax itself, for one exponential.

    The normaliser is kept in two parts, maximum and log of sum: one fp32 number near 60 would put
    an error of 4e-6 into every probability. Both results are normalised by the same rounded log,
    since divergences are of second order in an error that log q and q share.
    """
    u = u - u.amax(-1, keepdim=True)
    powers = u.exp()
    log_total = powers.sum(-1, keepdim=True).log()
    return u - log_total, powers * (-log_total).exp()


class Comparison(NamedTuple):
    """A divergence from the teacher's products ``zt`` ``(R, V)``, and the weight of each row.

    ``formula`` is a function and not a name: torch keeps compiled code for each function, but torch
    2.13 does not guard on an ``Enum`` that picks an entry of a table, and would run the first
    divergence for all. Numbers are 0-dim tensors: of a float torch 2.13 makes a double, which the
    loops of a CPU would convert for every eight logits, a sixth of their time.
    """

    zt: Tensor
    weight: Tensor
    student: LogitMap
    teacher: LogitMap
    formula: Formula
    beta: Mixture


class Labels(NamedTuple):
    """The cross entropy of labels ``(R,)``, to which the temperature does not apply."""

    labels: Tensor
    weight: Tensor
    student: LogitMap


def tile_pass(
    zs: Tensor, comparison: Comparison | None, labels: Labels | None, with_grad: bool
) -> list[Tensor]:
    """Return the divergence and the cross entropy of each row, those of the two that are asked for.

    ``zs`` holds the student's raw products ``(R, V)``. ``with_grad`` overwrites it by the gradient
    of the weighted sum of the results with respect to it.
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
    lp, p = softmax(ut.clamp(min=FLOOR))
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
    """Say whether a call over ``logits`` pairs of logits compiles its pointwise pass."""
    return device.type != "cpu" or logits >= CPU_COMPILE_LOGITS


def block_rows(device: torch.device, compiled: bool, rows: int, vocab_size: int) -> int:
    """Return how many rows of a tile one step of the pass takes."""
    if device.type == "cpu":
        limit = CPU_COMPILED_BLOCK if compiled else CPU_EAGER_BLOCK
        return min(rows, max(1, limit // vocab_size))
    # A compiled pass is one kernel, and an eager one makes temporaries as large as its block.
    return rows if compiled else max(1, rows // 16)


class TorchPass:
    """The pass by torch: eager, or compiled by Inductor."""

    def __init__(self, call: LossCall, factor: torch.dtype, tokens: int) -> None:
        compute = call.compute_dtype
        self.call, self.device = call, call.row_weight.device
        logits = len(call.student_hidden) * tokens * call.vocab_size
        self.compiled = is_compiled(self.device, logits)
        if self.compiled:
            keep_freed_blocks()
        row_bytes = bytes_per_row(call.vocab_size, factor, compute)
        self.layout = in_place(tokens, row_bytes, call.workspace_bytes)
        # 1 - beta in fp64: in fp32 it has no digits for a beta near 1.
        beta, rest = (torch.tensor(x, dtype=compute) for x in (call.beta, 1 - call.beta))
        self.beta = beta, rest
        self.student, self.untempered = self.maps(call.student_head)
        self.teacher = None if call.teacher_head is None else self.maps(call.teacher_head)[0]

    def maps(self, head: LensHead) -> list[LogitMap]:
        """Return the map from products to logits at the call's temperature, and that at 1.

        Their numbers are as the pass takes them.
        """
        head = head.prefix(self.call.vocab_size)
        return [
            as_tensors(head.logit_map(temperature), self.call.compute_dtype)
            for temperature in (self.call.temperature, 1.0)
        ]

    def survey(self) -> ColumnStatistics:
        """Return an empty survey of gradients."""
        return ColumnStatistics(self.compiled)

    def run(
        self,
        tiles: list[Tensor],
        terms: Terms,
        grad: Tensor | None,
        survey: Any,
    ) -> list[Tensor]:
        """Run the pass in blocks of rows; gradients are surveyed while they are in a cache."""
        step = block_rows(self.device, self.compiled, *tiles[0].shape)
        blocks = []
        for start in range(0, tiles[0].shape[0], step):
            block = slice(start, start + step)
            # A view that is all of its base would be compiled for that case only.
            zs, *zt = (tile[block].data for tile in tiles)
            comparison = labels = None
            if terms.divergence is not None:
                assert terms.weight is not None and self.teacher is not None
                formula = table.pointwise(terms.divergence, self.call.beta)
                weight = terms.weight[block]
                comparison = Comparison(
                    zt[0], weight, self.student, self.teacher, formula, self.beta
                )
            if terms.labels is not None:
                assert terms.label_weight is not None
                weight = terms.label_weight[block]
                labels = Labels(terms.labels[block], weight, self.untempered)
            arguments = zs, comparison, labels, grad is not None
            blocks.append(compiled.call(self.compiled, tile_pass, *arguments))
            if survey is not None:
                survey.add(zs)  # the gradient by now
        return [torch.cat(losses) for losses in zip(*blocks, strict=True)]


def as_tensors(logit_map: LogitMap, dtype: torch.dtype) -> LogitMap:
    """Return the map with its numbers as the pass takes them."""
    numbers = {
        name: torch.tensor(value, dtype=dtype)
        for name, value in vars(logit_map).items()
        if isinstance(value, float)
    }
    return replace(logit_map, **numbers)
