"""The ``torch`` backend: chunks of tokens against the whole vocabulary, nothing computed twice.

For each chunk both models are projected into two tiles of logits. One pointwise pass yields the
losses and turns the student's tile into its gradient. Two products turn that into the gradients of
hidden states and head. That is ``3 D_s + D_t`` multiplications per token and vocabulary entry, the
dense floor, while the logits held at any time are the two tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lens_kernels import divergence as table
from lens_kernels.backends import compiled, matmul
from lens_kernels.backends.accumulator import Accumulator
from lens_kernels.backends.head_products import ColumnStatistics
from lens_kernels.backends.pages import in_huge_pages, keep_freed_blocks
from lens_kernels.backends.torch import pointwise_pass
from lens_kernels.backends.torch.layout import bytes_per_row, chunk_rows, row_stride
from lens_kernels.backends.torch.pointwise_pass import Comparison, Labels
from lens_kernels.call import LossCall, LossResult
from lens_kernels.lens import LensHead, LogitMap

Rows = Tensor | slice  # of a chunk: a slice, or indices of unmasked tokens


def evaluate(call: LossCall) -> LossResult:
    """Return the rows of the call and the gradients of its loss."""
    chunks = _RowChunks(call)
    for pair in range(len(call.student_hidden)):
        for rows in chunks:
            chunks.evaluate(pair, rows)
    return chunks.sums.result()


class _Model:
    """One model's head, as its products take it."""

    def __init__(self, head: LensHead, call: LossCall) -> None:
        self.head = head.prefix(call.vocab_size)
        self.compute_dtype = call.compute_dtype
        self.factors = matmul.Factors(self.head.weight, call.operand_dtype, self.compute_dtype)
        self.weight = self.factors.weight
        self.tempered = self.logit_map(call.temperature)

    def read(
        self, hidden: Tensor, rows: Rows, normed: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the chunk as a factor, and what the norm's backward needs."""
        x = hidden[rows].to(self.compute_dtype)
        saved = None
        if normed and self.head.norm is not None:
            x, *statistics = self.head.norm.forward(x)
            saved = (statistics[0], statistics[1])
        return self.factors.rows(x), saved

    def logit_map(self, temperature: float) -> LogitMap:
        """Return the map from products to logits, its numbers as the pass takes them."""
        return pointwise_pass.as_tensors(self.head.logit_map(temperature), self.compute_dtype)


class _RowChunks:
    """The chunks of a call: their tiles, and the sums over them."""

    def __init__(self, call: LossCall) -> None:
        self.call = call
        compute = call.compute_dtype
        self.student = _Model(call.student_head, call)
        self.teacher = None if call.teacher_head is None else _Model(call.teacher_head, call)
        self.sums = Accumulator(call, self.student.factors.dtype)
        self.weight_sum: Tensor | None = None
        if call.grad_threshold is not None:
            self.weight_sum = self.student.weight.sum(0, dtype=compute)
        # 1 - beta in fp64: in fp32 it has no digits for a beta near 1.
        beta, rest = (torch.tensor(x, dtype=compute) for x in (call.beta, 1 - call.beta))
        self.beta = beta, rest
        self.untempered = self.student.logit_map(1.0)

        self.device = call.row_weight.device
        tokens, pairs = self.sums.tokens, len(call.student_hidden)
        logits = pairs * tokens * call.vocab_size
        self.compiled = pointwise_pass.is_compiled(self.device, logits)
        if self.compiled:
            keep_freed_blocks()
        row_bytes = bytes_per_row(call.vocab_size, self.student.factors.dtype, compute)
        self.chunk_rows = chunk_rows(tokens, row_bytes, call.workspace_bytes)
        shape = self.chunk_rows, row_stride(call.vocab_size)
        self.tiles = [
            in_huge_pages(self.student.weight.new_empty(shape, dtype=compute))[:, : call.vocab_size]
            for model in (self.student, self.teacher)
            if model is not None
        ]

    def __iter__(self) -> Iterator[Rows]:
        """Yield the rows of each chunk."""
        tokens, index = self.sums.tokens, self.sums.index
        for start in range(0, tokens, self.chunk_rows or 1):
            rows = slice(start, min(start + self.chunk_rows, tokens))
            yield rows if index is None else index[rows]

    def evaluate(self, pair: int, rows: Rows) -> None:
        """Evaluate one pair on one chunk."""
        call = self.call
        normed = call.normed[pair]
        x, saved = self.student.read(call.student_hidden[pair], rows, normed)
        tiles = [tile[: x.shape[0]] for tile in self.tiles]
        matmul.project(x, self.student.weight, tiles[0])
        if self.teacher is not None:
            x_teacher, _ = self.teacher.read(call.teacher_hidden[pair], rows, normed)
            matmul.project(x_teacher, self.teacher.weight, tiles[1])

        targets = self.sums.targets(pair, saved is not None)
        statistics = None
        if targets and self.weight_sum is not None:
            statistics = ColumnStatistics(self.compiled)
        self.pointwise(pair, rows, tiles, bool(targets), statistics)
        if not targets:
            return
        grad, columns = tiles[0], slice(0, call.vocab_size)
        d_x = self.sums.add_head_gradients(
            targets, grad, x, self.student.weight, columns, self.weight_sum, statistics
        )
        if d_x is not None:
            self.backward_of_norm(pair, rows, d_x, saved)

    def pointwise(
        self,
        pair: int,
        rows: Rows,
        tiles: list[Tensor],
        with_grad: bool,
        statistics: ColumnStatistics | None,
    ) -> None:
        """Run the pass over the chunk's tiles in blocks of rows, and store the losses.

        The statistics of gradients are taken while a block is still in a cache.
        """
        call, sums = self.call, self.sums
        labelled = call.labels is not None and pair == len(call.student_hidden) - 1
        step = pointwise_pass.block_rows(self.device, self.compiled, *tiles[0].shape)
        blocks = []
        for start in range(0, tiles[0].shape[0], step):
            block = slice(start, start + step)
            # A view that is all of its base would be compiled for that case only.
            zs, *zt = (tile[block].data for tile in tiles)
            comparison = labels = None
            if self.teacher is not None:
                weight = sums.weight[pair][rows][block]
                maps = self.student.tempered, self.teacher.tempered
                formula = table.pointwise(call.divergences[pair], call.beta)
                comparison = Comparison(zt[0], weight, *maps, formula, self.beta)
            if labelled:
                assert call.labels is not None
                weight = sums.weight[-1][rows][block]
                labels = Labels(call.labels[rows][block], weight, self.untempered)
            arguments = zs, comparison, labels, with_grad
            blocks.append(compiled.call(self.compiled, pointwise_pass.tile_pass, *arguments))
            if statistics is not None:
                statistics.add(zs)  # the gradient by now
        filled = ([pair] if self.teacher is not None else []) + ([-1] if labelled else [])
        for row, losses in zip(filled, zip(*blocks, strict=True), strict=True):
            sums.rows[row, rows] = torch.cat(losses)

    def backward_of_norm(
        self, pair: int, rows: Rows, grad: Tensor, saved: tuple[Tensor, Tensor] | None
    ) -> None:
        """Carry the gradient of a chunk's factor back through the norm to the hidden state."""
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
        if pair in grads:
            grads[pair][rows] = grad
