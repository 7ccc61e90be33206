"""Runs the sweeps of the ``triton`` backend, and sums their results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set

import torch
from torch import Tensor

from lens_kernels.backends import matmul
from lens_kernels.backends.accumulator import Accumulator
from lens_kernels.backends.triton import interpreter
from lens_kernels.backends.triton.kernels.gradients import Labels, gradient_chunk
from lens_kernels.backends.triton.kernels.launch import Tile
from lens_kernels.backends.triton.kernels.norm import norm_backward, norm_rows
from lens_kernels.backends.triton.kernels.online_kl import online_kl
from lens_kernels.backends.triton.kernels.operands import Operand, RowStats, RowSums, aligned
from lens_kernels.backends.triton.kernels.row_stats import row_stats
from lens_kernels.backends.triton.kernels.row_sums import row_sums
from lens_kernels.backends.triton.tiles import sizes, store
from lens_kernels.backends.triton.tiles.sizes import Sweep
from lens_kernels.call import LossCall, LossResult
from lens_kernels.divergence import FLOOR
from lens_kernels.lens import LensHead, LensNorm
from lens_kernels.options import RELATIVE_ENTROPIES, Divergence


def evaluate(call: LossCall) -> LossResult:
    """Return the losses of a call's rows, and the gradients of its loss."""
    if interpreter.INTERPRETING:
        interpreter.prepare()
    # Triton launches kernels on the current device, which may differ from the device of the
    # tensors.
    with torch.cuda.device_of(call.row_weight):
        sweeps = _Sweeps(call)
        if sweeps.sums.tokens:
            for pair in range(len(call.student_hidden)):
                sweeps.run(pair)
        return sweeps.sums.result()


class _Head:
    def __init__(self, head: LensHead, call: LossCall, temperature: float) -> None:
        self.head = head.prefix(call.vocab_size)
        self.dtype = call.operand_dtype or head.weight.dtype
        self.weight = aligned(self.head.weight.to(self.dtype))
        self.temperature = temperature

    def operand(self, hidden: Tensor, index: Tensor | None, norm: LensNorm | None) -> Operand:
        if norm is not None:
            x = norm_rows(hidden, index, norm, self.dtype)
        else:
            x = aligned((hidden if index is None else hidden[index]).to(self.dtype))
        bias = None if self.head.bias is None else self.head.bias.contiguous()
        return Operand(x, self.weight, bias, self.head.scale, self.head.softcap, self.temperature)


class _Sweeps:
    def __init__(self, call: LossCall) -> None:
        self.call = call
        ours, theirs = call.temperatures
        self.student = _Head(call.student_head, call, ours)
        self.teachers = [_Head(head, call, theirs) for head in call.teacher_heads]
        self.sums = Accumulator(call, self.student.dtype)
        self.rows = slice(None) if self.sums.index is None else self.sums.index
        # GEMMs of gradients take 16-bit factors if the device accumulates them in fp32.
        dtype, device = self.student.dtype, call.row_weight.device
        native = matmul.multiplies_natively(dtype, torch.float32, device)
        self.factor_dtype = dtype if native else torch.float32

    def run(self, pair: int) -> None:
        call, index = self.call, self.sums.index
        hidden, normed = call.student_hidden[pair], call.normed[pair]
        norm = self.student.head.norm if normed else None
        student = self.student.operand(hidden, index, norm)
        teacher = sums = labels = None
        if self.teachers:
            theirs = self.teachers[call.teacher_index(pair)]
            teacher_norm = theirs.head.norm if normed else None
            teacher = theirs.operand(call.teacher_hidden[pair], index, teacher_norm)
            given = None
            if call.teacher_statistics is not None:
                columns = call.teacher_statistics[pair, self.rows].unbind(-1)
                given = RowStats(*(column.contiguous() for column in columns))
            sums = self.row_sums(student, teacher, call.divergences[pair], given)
            self.sums.rows[pair, self.rows] = sums.f.clamp(max=call.token_clip)
        if call.labels is not None and pair == len(call.student_hidden) - 1:
            stats = None if sums is None else sums.student
            labels = self.cross_entropy(student, stats, call.labels[self.rows])
        targets = self.sums.targets(pair, norm is not None)
        if not targets:
            return
        d_x = self.gradients(pair, student, teacher, sums, labels, targets)
        if d_x is None:
            return
        grads = self.sums.grads
        if norm is not None:
            parts = [grads.get(key) for key in (pair, "norm_weight", "norm_bias")]
            norm_backward(d_x, hidden, index, norm, *parts)
        else:
            grads[pair][self.rows] = d_x

    def row_sums(
        self, student: Operand, teacher: Operand, divergence: Divergence, given: RowStats | None
    ) -> RowSums:
        vocab_size, beta = self.call.vocab_size, self.call.beta
        if divergence in RELATIVE_ENTROPIES:
            tile = tile_for(Sweep.ONLINE_KL, student, teacher)
            return online_kl(student, teacher, divergence, vocab_size, tile)
        student_stats, teacher_stats = (
            known or row_stats(operand, vocab_size, tile_for(Sweep.ROW_STATS, operand))
            for operand, known in ((student, None), (teacher, given))
        )
        tile = tile_for(Sweep.ROW_SUMS, student, teacher)
        return row_sums(
            student, teacher, student_stats, teacher_stats, divergence, beta, vocab_size, tile
        )

    def cross_entropy(self, student: Operand, stats: RowStats | None, labels: Tensor) -> Labels:
        """Store the cross entropy of every row, and return the inputs for its gradient.

        ``stats`` are the student's log-sum-exps, if known. The cross entropy uses temperature 1.
        """
        if stats is None or student.temperature != 1.0:
            student = student.untempered()
            tile = tile_for(Sweep.ROW_STATS, student)
            stats = row_stats(student, self.call.vocab_size, tile)
        log_q = student.logits_at(labels).clamp(min=FLOOR) - stats.maximum - stats.log_sum
        row = self.call.label_row
        self.sums.rows[row, self.rows] = -log_q
        return Labels(labels, stats, self.weight(row))

    def weight(self, row: int) -> Tensor:
        """Return a copy of the token weights of one loss term.

        Kernels need contiguous weights, but upstream gradients may be transposed. Triton would also
        compile a kernel for each alignment that slices have.
        """
        return self.sums.weight[row, self.rows].clone(memory_format=torch.contiguous_format)

    def gradients(
        self,
        pair: int,
        student: Operand,
        teacher: Operand | None,
        sums: RowSums | None,
        labels: Labels | None,
        targets: Set[int | str],
    ) -> Tensor | None:
        call = self.call
        operands = [student] if teacher is None else [student, teacher]
        tile = tile_for(Sweep.GRADIENTS, *operands, labels=labels is not None)
        divergence = call.divergences[pair] if sums is not None else None
        weight, x = self.weight(pair), student.x.to(self.factor_dtype)
        if sums is not None and call.token_clip < math.inf:
            weight.masked_fill_(sums.f > call.token_clip, 0.0)
        total: Tensor | None = None
        for columns, out in self.chunks(student, tile):
            gradient_chunk(
                student, teacher, sums, weight, labels, divergence, call.beta,
                call.vocab_size, columns.start, out, tile,
            )  # fmt: skip
            grad = out[:, : columns.stop - columns.start]
            head = student.weight[columns].to(self.factor_dtype)
            d_x = self.sums.add_head_gradients(targets, grad, x, head, columns)
            if d_x is not None:
                total = d_x if total is None else total.add_(d_x)
        return total

    def chunks(self, student: Operand, tile: Tile) -> Iterator[tuple[slice, Tensor]]:
        vocab_size = self.call.vocab_size
        tiles = -(-vocab_size // tile.block_v)
        bytes_per_tile = student.tokens * tile.block_v * student.x.element_size()
        tiles_that_fit = max(1, self.call.workspace_bytes // bytes_per_tile)
        chunks = -(-tiles // tiles_that_fit)
        step = -(-tiles // chunks) * tile.block_v
        out = student.x.new_empty(student.tokens, step)
        for start in range(0, vocab_size, step):
            yield slice(start, min(start + step, vocab_size)), out


def tile_for(sweep: Sweep, *operands: Operand, labels: bool = False) -> Tile:
    """Return the block sizes with which a sweep processes these operands."""
    x = min((operand.x for operand in operands), key=lambda x: x.shape[1])
    extras = labels or any(o.bias is not None or o.softcap is not None for o in operands)
    # Tuning runs without bias, softcap and labels. With any of these, a tuned tile may take more
    # registers than a thread has.
    tuned = None if extras else store.lookup(sweep, x.dtype, x.shape[1], x.device)
    return tuned or sizes.default(sweep, sizes.arch_of(x.device), x.dtype, x.shape[1], extras)
