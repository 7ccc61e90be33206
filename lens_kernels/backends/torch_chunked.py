"""The ``torch`` backend: chunks of tokens against the whole vocabulary, nothing computed twice.

For each chunk both models are projected into two tiles of logits; one pointwise pass yields the
losses and turns the student's tile into its gradient; two products turn that into the gradients of
hidden states and head. That is ``3 D_s + D_t`` multiplications per token and vocabulary entry, the
dense floor, while the logits held at any time are the two tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lens_kernels import divergence as table
from lens_kernels.backends import matmul, tile_pass
from lens_kernels.backends.head_products import Survey
from lens_kernels.backends.ledger import Ledger
from lens_kernels.backends.pages import in_huge_pages, keep_freed_blocks
from lens_kernels.call import Evaluation, LossCall
from lens_kernels.lens import LensHead, LogitMap

# Rows of a tile begin at lines of a CPU's cache, of this many logits: at 50257 entries projections
# take 7 % less time than in rows without gaps (2 cores, hidden size 768 and 1600). The number of
# lines in a row is odd, or the rows of a column would share few places in the first cache: at 49152
# entries one line more saves 9 % of the projections and 9 % of the head's gradient (hidden size
# 576).
LINE = 16


def evaluate(call: LossCall) -> Evaluation:
    """Return the rows of the call and the gradients of its loss."""
    run = _Run(call)
    for pair in range(len(call.student_hidden)):
        for rows in run.chunks():
            run.chunk(pair, rows)
    return run.ledger.result()


def chunk_rows(tokens: int, bytes_per_row: int, budget: int) -> int:
    """Return how many tokens are taken at once: even chunks within a budget."""
    limit = max(1, budget // bytes_per_row)
    return math.ceil(tokens / max(1, math.ceil(tokens / limit)))


def row_stride(vocab_size: int) -> int:
    """Return the distance of a tile's rows in logits."""
    return (math.ceil(vocab_size / LINE) | 1) * LINE


def bytes_per_row(vocab_size: int, operand: torch.dtype, compute: torch.dtype) -> int:
    """Return the bytes of the tiles for one token.

    These are both models' logits, and where products take 16-bit factors a copy of the gradient.
    """
    copy = 0 if operand == compute else operand.itemsize
    return row_stride(vocab_size) * 2 * compute.itemsize + vocab_size * copy


class _Side:
    """One model's head."""

    def __init__(self, head: LensHead, call: LossCall, compute: torch.dtype) -> None:
        self.head = head.prefix(call.spec.vocab_size)
        self.compute = compute
        self.factors = matmul.Factors(self.head.weight, call.operand_dtype, compute)
        self.weight = self.factors.weight

    def read(
        self, hidden: Tensor, rows: Tensor | slice, normed: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the chunk as a factor, and what the norm's backward needs."""
        x = hidden[rows].to(self.compute)
        saved = None
        if normed and self.head.norm is not None:
            x, *statistics = self.head.norm.forward(x)
            saved = (statistics[0], statistics[1])
        return self.factors.rows(x), saved


class _Run:
    """Buffers and sums of one call."""

    def __init__(self, call: LossCall) -> None:
        self.call = call
        weight = call.student_head.weight
        self.device = weight.device
        fp64 = torch.float64 in (weight.dtype, call.teacher_head.weight.dtype)
        self.compute = torch.float64 if fp64 else torch.float32
        self.student = _Side(call.student_head, call, self.compute)
        self.teacher = _Side(call.teacher_head, call, self.compute)
        self.ledger = Ledger(call, self.compute)
        self.tokens, self.index = self.ledger.tokens, self.ledger.index
        self.grads = self.ledger.grads
        self.weight_sum: Tensor | None = None
        if call.spec.grad_threshold is not None:
            self.weight_sum = self.student.weight.sum(0, dtype=self.compute)

        temperature = call.spec.temperature
        self.maps = [self.logit_map(side, temperature) for side in (self.student, self.teacher)]
        self.untempered = self.logit_map(self.student, 1.0)
        self.beta = torch.tensor(call.spec.beta, dtype=self.compute)

        pairs = len(call.student_hidden)
        vocab_size = call.spec.vocab_size
        self.compiled = tile_pass.is_compiled(self.device, pairs * self.tokens * vocab_size)
        if self.compiled:
            keep_freed_blocks()
        tile = self.student.weight.new_empty(0, dtype=self.compute)
        row = bytes_per_row(vocab_size, self.student.factors.dtype, self.compute)
        self.chunk_rows = chunk_rows(self.tokens, row, call.spec.workspace_bytes)
        shape = self.chunk_rows, row_stride(vocab_size)
        padded = [in_huge_pages(tile.new_empty(shape)) for _ in range(2)]
        self.tiles = [each[:, :vocab_size] for each in padded]

    def logit_map(self, side: _Side, temperature: float) -> LogitMap:
        """Return what makes logits of a model's products."""
        return tile_pass.as_tensors(side.head.logit_map(temperature), self.compute)

    def chunks(self) -> Iterator[Tensor | slice]:
        """Yield the rows of each chunk, as a slice or as indices of the unmasked tokens."""
        for start in range(0, self.tokens, self.chunk_rows or 1):
            rows = slice(start, min(start + self.chunk_rows, self.tokens))
            yield rows if self.index is None else self.index[rows]

    def chunk(self, pair: int, rows: Tensor | slice) -> None:
        """Do all the work of one pair on one chunk."""
        call = self.call
        normed = call.spec.normed[pair]
        x_student, saved = self.student.read(call.student_hidden[pair], rows, normed)
        x_teacher, _ = self.teacher.read(call.teacher_hidden[pair], rows, normed)
        zs, zt = (tile[: x_student.shape[0]] for tile in self.tiles)
        matmul.project(x_student, self.student.weight, zs)
        matmul.project(x_teacher, self.teacher.weight, zt)

        wanted = self.ledger.wanted(pair, saved is not None)
        survey = Survey(self.compiled) if wanted and self.weight_sum is not None else None
        self.pointwise(pair, rows, zs, zt, bool(wanted), survey)
        if not wanted:
            return
        columns = slice(0, zs.shape[1])
        weight = self.student.weight
        known = self.weight_sum, survey
        d_x = self.ledger.head_gradients(wanted, zs, x_student, weight, columns, *known)
        if d_x is not None:
            self.before_head(pair, rows, d_x, saved)

    def pointwise(
        self,
        pair: int,
        rows: Tensor | slice,
        zs: Tensor,
        zt: Tensor,
        want_grad: bool,
        survey: Survey | None,
    ) -> None:
        """Run the pointwise pass over the chunk's tiles in blocks of rows and store the losses.

        Gradients are surveyed while a block is still in a cache.
        """
        call = self.call
        spec = call.spec
        weight = self.ledger.weight[pair][rows]
        labelled = call.labels is not None and pair == len(call.student_hidden) - 1
        options = (*self.maps, table.pointwise(spec.divergences[pair]), self.beta, want_grad)
        step = tile_pass.block_rows(self.device, self.compiled, *zs.shape)
        losses, cross_entropies = [], []
        for start in range(0, zs.shape[0], step):
            block = slice(start, start + step)
            # A view that is all of its base would be compiled for that case alone.
            grad = zs[block].data  # after the pass
            args = (grad, zt[block].data, weight[block], *options)
            if labelled:
                assert call.labels is not None
                label_weight = self.ledger.weight[-1][rows][block]
                label_args = (call.labels[rows][block], label_weight, self.untempered)
                loss, cross_entropy = tile_pass.run(
                    self.compiled, tile_pass.tile_pass_with_labels, *args, *label_args
                )
                cross_entropies.append(cross_entropy)
            else:
                loss = tile_pass.run(self.compiled, tile_pass.tile_pass, *args)
            losses.append(loss)
            if survey is not None:
                survey.add(grad)
        self.ledger.rows[pair, rows] = torch.cat(losses)
        if labelled:
            self.ledger.rows[-1, rows] = torch.cat(cross_entropies)

    def before_head(
        self,
        pair: int,
        rows: Tensor | slice,
        grad: Tensor,
        saved: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Carry the gradient of a chunk's factor back through the norm to the hidden state."""
        if saved is not None:
            x_hat, rstd = saved
            if "norm_weight" in self.grads:
                self.grads["norm_weight"] += (grad * x_hat).sum(0)
            if "norm_bias" in self.grads:
                self.grads["norm_bias"] += grad.sum(0)
            norm = self.student.head.norm
            assert norm is not None
            grad = norm.backward(grad, x_hat, rstd)
        if pair in self.grads:
            self.grads[pair][rows] = grad
