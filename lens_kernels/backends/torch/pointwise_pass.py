"""The pass in torch, compiled if that saves time. Gradients overwrite the student's logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from lens_kernels.backends.torch.standardized import Moments, Standardized
from lens_kernels.backends.torch.targets import Target, softmax, target_rows
from lens_kernels.call import LossCall
from lens_kernels.divergence import FLOOR, Formula, Mixture
from lens_kernels.lens import LensHead, LogitMap

# On a CPU, a call with at least 8 million logits per model compiles the pass. Compiling takes 6 to
# 10 s once per process, or 24 s without Inductor's disk cache. It pays off after about 120 such
# calls (2 cores). On other devices the pass is always compiled.
CPU_COMPILE_LOGITS = 1 << 23
# The number of logits that the uncompiled and the compiled pass process at once on a CPU. Their
# temporaries then stay in the cache.
CPU_EAGER_BLOCK = 1 << 17
CPU_COMPILED_BLOCK = 1 << 20


class Comparison(NamedTuple):
    """The inputs of a divergence from the teacher, whose products are ``zt`` ``(R, V)``.

    ``formula`` is a function and not a name, because torch 2.13 does not recompile if an ``Enum``
    changes. Numbers are 0-dim tensors, because torch 2.13 would turn floats into doubles, which
    takes time on a CPU.
    """

    zt: Tensor
    weight: Tensor
    student: LogitMap
    teacher: LogitMap
    formula: Formula
    beta: Mixture
    teacher_statistics: Tensor | None = None
    # The inverse temperatures of student and teacher, if logits are standardised. The maps to
    # logits then have temperature 1.
    standardized: tuple[Tensor, Tensor] | None = None
    clip: Tensor | None = None


def tile_pass(
    zs: Tensor, comparison: Comparison | None, targets: Sequence[Target], with_grad: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the losses of each row: the divergence from the teacher, then those of ``targets``.

    ``zs`` holds the student's products ``hidden @ weight.T``, ``(R, V)``. If ``with_grad``, the
    gradient of the weighted losses overwrites ``zs``, except for one part: the gradients at the
    ``ids`` of targets are returned, and the caller adds them.
    """
    losses: list[Tensor] = []
    grads: list[Tensor] = []
    at_ids: list[Tensor] = []
    if comparison is not None:
        divergence, grad = _divergence(zs, comparison, with_grad)
        losses.append(divergence)
        grads += [] if grad is None else [grad]
    for target in targets:
        values, grad, part = target_rows(zs, target, with_grad)
        losses += values
        grads += [] if grad is None else [grad]
        at_ids += part
    if grads:
        zs.copy_(grads[0])
        for grad in grads[1:]:
            zs.add_(grad)
    return losses, at_ids


def _divergence(zs: Tensor, row: Comparison, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    known = row.teacher_statistics
    entries = Entries.of(zs, row, None, None if known is None else known.split(1, -1))
    loss, grad = entries.f.sum(-1), None
    if with_grad:
        grad = entries.gradient(row, loss, entries.h.sum(-1, keepdim=True), zs.shape[-1])
    return (loss if row.clip is None else loss.clamp(max=row.clip)), grad


class Entries(NamedTuple):
    """The parts of a divergence at each vocabulary entry, ``(R, V)`` or those of a rank.

    ``slope`` is the derivative of the student's logits with respect to its products.
    """

    q: Tensor
    f: Tensor
    h: Tensor
    slope: Tensor | float
    standardized: Standardized | None

    @staticmethod
    def of(
        zs: Tensor,
        row: Comparison,
        student_statistics: Sequence[Tensor] | None,
        teacher_statistics: Sequence[Tensor] | None,
        moments: Sequence[Moments | None] = (None, None),
    ) -> Entries:
        """Return the parts for the student's products ``zs``.

        Statistics are the maximum of a model's logits and the log of their sum of exponentials. If
        the vocabulary is sharded, all statistics and moments are those of the whole vocabulary.
        """
        (us, slope, standardized), ut = compared_logits(zs, row, moments)
        lq, q, _ = softmax(us.clamp(min=FLOOR), student_statistics)
        lp, p, _ = softmax(ut.clamp(min=FLOOR), teacher_statistics)
        f, h = row.formula(lp, lq, p, q, row.beta)
        return Entries(q, f, h, slope, standardized)

    def gradient(
        self,
        row: Comparison,
        loss: Tensor,
        h_sum: Tensor,
        vocab_size: int,
        product: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of the weighted losses.

        ``loss`` and ``h_sum`` are the sums of ``f`` and ``h``. ``product`` is ``sum_v G_v z'_v`` of
        standardised logits, if these are not all entries.
        """
        weight = row.weight if row.clip is None else torch.where(loss > row.clip, 0.0, row.weight)
        grad, slope = self.h - self.q * h_sum, self.slope
        if self.standardized is not None:
            if product is None:
                product = (grad * self.standardized.z).sum(-1, keepdim=True)
            grad = self.standardized.backward(grad, product, vocab_size)
            slope = slope * self.standardized.scale
        return grad * (weight[:, None] * slope)


def compared_logits(
    zs: Tensor, row: Comparison, moments: Sequence[Moments | None] = (None, None)
) -> tuple[tuple[Tensor, Tensor | float, Standardized | None], Tensor]:
    """Return the student's logits, slope and standardisation, and the teacher's logits."""
    us, slope = row.student(zs)
    ut, _ = row.teacher(row.zt)
    if row.standardized is None:
        return (us, slope, None), ut
    ours, theirs = (
        Standardized.of(u, inverse, known)
        for u, inverse, known in zip((us, ut), row.standardized, moments, strict=True)
    )
    return (ours.logits, slope, ours), theirs.logits


def is_compiled(device: torch.device, logits: int) -> bool:
    """Return whether a call with this many logits per model compiles its pointwise pass."""
    return device.type != "cpu" or logits >= CPU_COMPILE_LOGITS


def block_rows(device: torch.device, compiled: bool, rows: int, vocab_size: int) -> int:
    """Return how many rows of a tile the pass processes at once."""
    if device.type == "cpu":
        limit = CPU_COMPILED_BLOCK if compiled else CPU_EAGER_BLOCK
        return min(rows, max(1, limit // vocab_size))
    # The temporaries of the uncompiled pass are as large as its block. The compiled pass needs
    # none.
    return rows if compiled else max(1, rows // 16)


class TorchPass:
    """The pass by torch: eager code, or code compiled by Inductor."""

    def __init__(self, call: LossCall, factor: torch.dtype, tokens: int) -> None:
        compute = call.compute_dtype
        self.call, self.device = call, call.row_weight.device
        columns = call.widest or call.vocab_size  # all ranks must have the same layout
        logits = len(call.student_hidden) * tokens * columns
        self.compiled = is_compiled(self.device, logits)
        if self.compiled:
            keep_freed_blocks()
        row_bytes = bytes_per_row(columns, factor, compute)
        self.layout = in_place(tokens, row_bytes, call.workspace_bytes)
        # Compute 1 - beta in fp64: in fp32 it loses its digits for beta near 1.
        beta, rest = (torch.tensor(x, dtype=compute) for x in (call.beta, 1 - call.beta))
        self.beta = beta, rest
        self.smoothing, self.z_loss = (
            torch.tensor(x, dtype=compute) if x else None
            for x in (call.label_smoothing, call.z_loss)
        )
        self.clip = None
        if call.token_clip < math.inf:
            self.clip = torch.tensor(call.token_clip, dtype=compute)
        ours, theirs = call.temperatures
        inverse_ours, inverse_theirs = (torch.tensor(1 / x, dtype=compute) for x in (ours, theirs))
        self.inverse_temperatures = inverse_ours, inverse_theirs
        self.student = self.maps(call.student_head, ours)
        self.teachers = [self.maps(head, theirs) for head in call.teacher_heads]

    def maps(self, head: LensHead, temperature: float) -> tuple[LogitMap, LogitMap]:
        """Return two maps from a head's products to logits: at ``temperature``, and at 1.

        The numbers in the maps are 0-dim tensors.
        """
        head = head.prefix(self.call.vocab_size)
        tempered, plain = (
            as_tensors(head.logit_map(each), self.call.compute_dtype) for each in (temperature, 1.0)
        )
        return tempered, plain

    def grad_stats(self) -> ColumnStatistics:
        """Return empty statistics of logit gradients."""
        return ColumnStatistics(self.compiled)

    def run(
        self,
        tiles: list[Tensor],
        terms: Terms,
        grad: Tensor | None,
        grad_stats: Any,
    ) -> list[Tensor]:
        """Run the pass in blocks of rows, which fit in the CPU's cache."""
        step = block_rows(self.device, self.compiled, *tiles[0].shape)
        blocks = []
        for start in range(0, tiles[0].shape[0], step):
            block = slice(start, start + step)
            zs, comparison, targets = self.arguments(tiles, terms, block)
            arguments = zs, comparison, targets, grad is not None
            losses, at_ids = compiled.call(self.compiled, tile_pass, *arguments)
            blocks.append(losses)
            for target, part in zip(targets, at_ids, strict=False):
                zs.scatter_add_(-1, target.ids, part)
            if grad_stats is not None:
                grad_stats.add(zs)  # zs now holds the gradient
        return [torch.cat(losses) for losses in zip(*blocks, strict=True)]

    def arguments(
        self, tiles: list[Tensor], terms: Terms, block: slice
    ) -> tuple[Tensor, Comparison | None, list[Target]]:
        """Return the arguments of ``tile_pass`` for a block of rows."""
        # ``data`` drops the link to the base tensor. With it, torch would compile one more variant
        # for views of a whole base.
        zs, *zt = (tile[block].data for tile in tiles)
        comparison = None
        if zt and terms.divergence is not None and terms.targets is None:
            comparison = self.comparison(terms, block, zt[0])
        return zs, comparison, self.targets(terms, block)

    def comparison(self, terms: Terms, block: slice, zt: Tensor) -> Comparison:
        """Return the inputs of a block's divergence from the teacher's products ``zt``."""
        assert terms.divergence is not None and terms.weight is not None
        formula = table.pointwise(terms.divergence, self.call.beta)
        given = terms.teacher_statistics
        given = None if given is None else given[block]
        student, teacher = (
            maps[int(terms.standardized)] for maps in (self.student, self.teachers[terms.teacher])
        )
        return Comparison(
            zt, terms.weight[block], student, teacher, formula, self.beta, given,
            self.inverse_temperatures if terms.standardized else None, self.clip,
        )  # fmt: skip

    def targets(self, terms: Terms, block: slice) -> list[Target]:
        """Return a block's targets: sparse targets that replace a teacher, then labels."""
        result = []
        if terms.targets is not None:
            assert terms.weight is not None
            sparse = terms.targets.at(block)
            result.append(
                Target(
                    sparse.ids, sparse.values, terms.weight[block],
                    self.student[int(terms.standardized)], sparse.smoothing, sparse.rest,
                    sparse.constant, clip=self.clip,
                    inverse_temperature=(
                        self.inverse_temperatures[0] if terms.standardized else None
                    ),
                )
            )  # fmt: skip
        if terms.labels is not None:
            assert terms.label_weight is not None
            ids, values = terms.labels[block, None], None
            if self.smoothing is not None:
                values = (1 - self.smoothing).to(ids.device).expand(ids.shape)
            result.append(
                Target(
                    ids, values, terms.label_weight[block], self.student[1], self.smoothing,
                    z_loss=self.z_loss, reports=self.call.reports,
                )
            )  # fmt: skip
        return result


def as_tensors(logit_map: LogitMap, dtype: torch.dtype) -> LogitMap:
    """Replace the floats of a map by 0-dim tensors."""
    numbers = {
        name: torch.tensor(value, dtype=dtype)
        for name, value in vars(logit_map).items()
        if isinstance(value, float)
    }
    return replace(logit_map, **numbers)
