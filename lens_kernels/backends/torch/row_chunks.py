"""The ``torch`` backend. It processes tiles of tokens, and computes nothing twice.

For each tile, one GEMM per model computes the logits over the whole vocabulary. One pass turns the
logits into losses and the gradient of the student's logits. Two more GEMMs turn this gradient into
the gradients of hidden states and head. With hidden sizes ``D_s`` and ``D_t`` of student and
teacher, each token costs ``3 D_s + D_t`` multiplications per vocabulary entry. Memory holds one
tile of logits per model at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lens_kernels.backends import matmul
from lens_kernels.backends.accumulator import Accumulator
from lens_kernels.backends.head_products import GradientStatistics
from lens_kernels.backends.pages import in_huge_pages
from lens_kernels.backends.torch.layout import Piece, has_row_kernel, row_stride
from lens_kernels.backends.torch.passes import Pass, Terms
from lens_kernels.backends.torch.pointwise_pass import TorchPass
from lens_kernels.backends.torch.tile_sets import TileSets
from lens_kernels.call import LossCall, LossResult
from lens_kernels.lens import LensHead
from lens_kernels.options import Divergence
from lens_kernels.targets import TargetRows

Rows = Tensor | slice  # a slice of tokens, or the indices of unmasked tokens
MakePass = Callable[[LossCall, torch.dtype, int], Pass]


def evaluate(call: LossCall, make_pass: MakePass | None = None) -> LossResult:
    """Return the losses of a call's rows, and the gradients of its loss."""
    chunks = _RowChunks(call, make_pass or pass_for(call))
    try:
        for tiles in chunks.layout.steps(len(call.student_hidden), chunks.sums.tokens):
            chunks.step(tiles)
    finally:  # no pass may still use the memory that is freed after an error
        chunks.tile_sets.wait()
    return chunks.sums.result()


def pass_for(call: LossCall) -> MakePass:
    """Return the class of the pass, by the device and by whether heads are sharded."""
    device, sharded = call.row_weight.device, bool(call.group)
    if has_row_kernel(device, call.compute_dtype, call.features(), sharded):
        if sharded:
            from lens_kernels.backends.torch.sharded_row_kernel_pass import ShardedRowKernelPass

            return ShardedRowKernelPass
        from lens_kernels.backends.torch.row_kernel_pass import RowKernelPass

        return RowKernelPass
    if sharded:
        from lens_kernels.backends.torch.sharded_pass import ShardedPass

        return ShardedPass
    return TorchPass


class _Model:
    def __init__(self, head: LensHead, call: LossCall) -> None:
        self.head = head.prefix(call.vocab_size)
        self.compute_dtype = call.compute_dtype
        self.factors = matmul.Factors(self.head.weight, call.operand_dtype, self.compute_dtype)
        self.weight = self.factors.weight

    def read(self, hidden: Tensor, rows: Rows, normed: bool) -> _Read:
        x = hidden[rows].to(self.compute_dtype)
        saved = None
        if normed and self.head.norm is not None:
            x, *statistics = self.head.norm.forward(x)
            saved = (statistics[0], statistics[1])
        return _Read(self.factors.rows(x), saved)


class _Read(NamedTuple):
    """Hidden states for a GEMM. The norm's backward pass needs ``saved``: ``(x_hat, rstd)``."""

    x: Tensor
    saved: tuple[Tensor, Tensor] | None


class _RowChunks:
    def __init__(self, call: LossCall, make_pass: MakePass) -> None:
        self.call = call
        compute = call.compute_dtype
        self.student = _Model(call.student_head, call)
        self.teachers = [_Model(head, call) for head in call.teacher_heads]
        factor = self.student.factors.dtype
        self.sums = Accumulator(call, factor)
        self.weight_sum: Tensor | None = None
        if call.grad_threshold is not None:
            self.weight_sum = self.student.weight.sum(0, dtype=compute)
        self.compare = make_pass(call, factor, self.sums.tokens)
        self.layout = self.compare.layout

        def buffer(rows: int, stride: int, dtype: torch.dtype) -> Tensor:
            empty = self.student.weight.new_empty(rows, stride, dtype=dtype)
            return in_huge_pages(empty)[:, : call.vocab_size]

        sets = [
            [
                buffer(self.layout.tile_rows, row_stride(call.vocab_size), compute)
                for _ in range(2 if self.teachers else 1)
            ]
            for _ in range(self.layout.sets)
        ]
        self.tile_sets = TileSets(sets)
        self.grad = sets[0][0]
        if self.layout.grad_stride is not None and call.needing_grad():
            self.grad = buffer(self.layout.grad_rows, self.layout.grad_stride, factor)

    def rows(self, piece: Piece) -> Rows:
        rows = slice(piece.start, piece.stop)
        return rows if self.sums.index is None else self.sums.index[rows]

    def step(self, tiles: list[list[Piece]]) -> None:
        call, norm = self.call, self.student.head.norm
        pieces = [piece for tile in tiles for piece in tile]
        targets: set[int | str] = set()
        for pair in {piece.pair for piece in pieces}:
            targets |= self.sums.targets(pair, call.normed[pair] and norm is not None)
        grad_stats = None
        if targets and self.weight_sum is not None:
            grad_stats = self.compare.grad_stats()
        reads: list[_Read] = []
        done = 0
        for tile in tiles:
            logits = self.tile_sets.next()
            reads += self.project(tile, logits)
            rows = sum(piece.stop - piece.start for piece in tile)
            grad = self.grad[done : done + rows] if targets else None
            self.tile_sets.run(partial(self.evaluate, tile, logits, grad, grad_stats))
            done += rows
        self.tile_sets.wait()
        if not targets:
            return
        d_x = self.sums.add_head_gradients(
            targets, self.grad[:done], _joined([read.x for read in reads]), self.student.weight,
            slice(0, call.vocab_size), self.weight_sum, grad_stats,
        )  # fmt: skip
        if d_x is None:
            return
        parts = d_x.split([read.x.shape[0] for read in reads])
        for piece, read, part in zip(pieces, reads, parts, strict=True):
            self.backward_of_norm(piece, part, read.saved)
            if piece.stop == self.sums.tokens:
                self.sums.finish(piece.pair)

    def project(self, tile: list[Piece], out: list[Tensor]) -> list[_Read]:
        """Compute a tile's logits, and return what the student's backward pass needs."""
        call, start = self.call, 0
        if self.teachers:
            compared = [piece for piece in tile if call.has_teacher(piece.pair)]  # they come first
            for teacher, run in groupby(compared, lambda piece: call.teacher_index(piece.pair)):
                logits = out[1][start:]
                reads = self.logits(self.teachers[teacher], call.teacher_hidden, [*run], logits)
                start += sum(read.x.shape[0] for read in reads)
        return self.logits(self.student, call.student_hidden, tile, out[0])

    def logits(
        self, model: _Model, hidden: list[Tensor], pieces: list[Piece], out: Tensor
    ) -> list[_Read]:
        normed = self.call.normed
        reads = [model.read(hidden[p.pair], self.rows(p), normed[p.pair]) for p in pieces]
        x = _joined([read.x for read in reads])
        matmul.project(x, model.weight, out[: x.shape[0]])
        return reads

    def evaluate(
        self,
        tile: list[Piece],
        tile_logits: list[Tensor],
        grad: Tensor | None,
        grad_stats: GradientStatistics | None,
    ) -> None:
        """Run the pass over a tile, and store the losses of its rows.

        Consecutive pieces of the tile with the same loss terms share one run of the pass.
        """
        sums = self.sums
        start = 0
        for (divergence, labelled, standardized, teacher, sparse), run in groupby(tile, self.kind):
            pieces = [*run]
            stop = start + sum(piece.stop - piece.start for piece in pieces)
            rows = [(piece.pair, self.rows(piece)) for piece in pieces]
            weight = labels = label_weight = statistics = targets = None
            if divergence is not None:
                weight = _joined([sums.weight[pair][at] for pair, at in rows])
                if (given := self.call.teacher_statistics) is not None:
                    statistics = _joined([given[pair][at] for pair, at in rows])
                if sparse:
                    assert self.call.targets is not None
                    targets = TargetRows.joined([self.call.targets.at(at) for _, at in rows])
            if labelled:
                assert self.call.labels is not None
                labels = _joined([self.call.labels[at] for _, at in rows])
                label_row = sums.weight[self.call.label_row]
                label_weight = _joined([label_row[at] for _, at in rows])
            losses = self.compare.run(
                [logits[start:stop] for logits in tile_logits],
                Terms(
                    divergence,
                    weight,
                    labels,
                    label_weight,
                    statistics,
                    targets,
                    standardized,
                    teacher,
                ),  # fmt: skip
                None if grad is None else grad[start:stop],
                grad_stats,
            )
            sizes = [piece.stop - piece.start for piece in pieces]
            for (pair, at), *parts in zip(rows, *(x.split(sizes) for x in losses), strict=True):
                filled = [] if divergence is None else [pair]
                if labelled:  # the log-sum-exp and the entropy come last, if requested
                    filled += range(self.call.label_row, len(sums.rows))
                for row, part in zip(filled, parts, strict=True):
                    sums.rows[row, at] = part
            start = stop

    def kind(self, piece: Piece) -> tuple[Divergence | None, bool, bool, int, bool]:
        call = self.call
        labelled = call.labels is not None and piece.pair == len(call.student_hidden) - 1
        divergence = call.divergences[piece.pair] if call.divergences else None
        standardized = bool(call.standardized) and call.standardized[piece.pair]
        sparse = call.targets is not None and not call.has_teacher(piece.pair)
        return divergence, labelled, standardized, call.teacher_index(piece.pair), sparse

    def backward_of_norm(
        self, piece: Piece, grad: Tensor, saved: tuple[Tensor, Tensor] | None
    ) -> None:
        grads = self.sums.grads
        if saved is not None:
            x_hat, rstd = saved
            if "norm_weight" in grads:
                grads["norm_weight"] += (grad * x_hat).sum(0)
            if "norm_bias" in grads:
                grads["norm_bias"] += grad.sum(0)
            norm = self.student.head.norm
            assert norm is not None
            grad = norm.backward(grad, x_hat, rstd)
        if piece.pair in grads:
            grads[piece.pair][self.rows(piece)] = grad


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
