"""Runs the sweeps of the ``triton`` backend, and sums their results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lens_kernels.backends import matmul
from lens_kernels.backends.accumulator import Accumulator
from lens_kernels.backends.triton import interpreter, sparse
from lens_kernels.backends.triton.kernels.deviations import Standardized, standardized
from lens_kernels.backends.triton.kernels.gradients import Labels, gradient_chunk
from lens_kernels.backends.triton.kernels.launch import Tile
from lens_kernels.backends.triton.kernels.norm import norm_backward, norm_rows
from lens_kernels.backends.triton.kernels.online_kl import online_kl
from lens_kernels.backends.triton.kernels.operands import Operand, RowStats, RowSums, aligned
from lens_kernels.backends.triton.kernels.row_stats import row_stats
from lens_kernels.backends.triton.kernels.row_sums import row_sums
from lens_kernels.backends.triton.kernels.targets import Targets
from lens_kernels.backends.triton.tiles import sizes, store
from lens_kernels.backends.triton.tiles.sizes import Sweep
from lens_kernels.call import LossCall, LossResult
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


@dataclass(frozen=True, eq=False)
class _Term:
    """The student's rows, and what the gradient of their divergence needs.

    The student is compared with a teacher, or with sparse ``targets``. Without either there is no
    divergence. ``left_out`` marks rows whose divergence has no gradient.
    """

    student: Operand
    stats: RowStats | None = None
    teacher: Operand | None = None
    sums: RowSums | None = None
    divergence: Divergence | None = None
    targets: Targets | None = None
    left_out: Tensor | None = None
    correction: tuple[Tensor, Tensor] | None = None


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
        term, labels = _Term(student), None
        if call.divergences:
            term = self.compare(pair, student)
        if call.labels is not None and pair == len(call.student_hidden) - 1:
            labels = self.cross_entropy(student, term, call.labels[self.rows])
        targets = self.sums.targets(pair, norm is not None)
        if not targets:
            return
        d_x = self.gradients(pair, term, labels, targets)
        if d_x is None:
            return
        grads = self.sums.grads
        if norm is not None:
            parts = [grads.get(key) for key in (pair, "norm_weight", "norm_bias")]
            norm_backward(d_x, hidden, index, norm, *parts)
        else:
            grads[pair][self.rows] = d_x

    def compare(self, pair: int, student: Operand) -> _Term:
        """Store a pair's divergence from its teacher or its sparse targets."""
        call, vocab_size = self.call, self.call.vocab_size
        scaled, own = None, bool(call.standardized) and call.standardized[pair]
        if own:
            scaled = self.standardized(student)
            student = scaled.operand
        # The gradient of standardised logits needs one more sum over the vocabulary.
        moment, with_moment = None, own and bool(self.sums.grads)
        if call.targets is not None and pair >= len(call.teacher_hidden):
            rows = call.targets.at(self.rows)
            tile = tile_for(Sweep.ROW_STATS, student, extras=True)
            loss, targets, moment = sparse.compare(student, rows, vocab_size, tile, with_moment)
            term = _Term(student, targets.stats, targets=targets)
        else:
            teacher = self.teacher(pair)
            if own:
                teacher = self.standardized(teacher).operand
            divergence = call.divergences[pair]
            sums = self.row_sums(student, teacher, divergence, self.given(pair, own), with_moment)
            loss, moment = sums.f, sums.sum_with_log_q() if with_moment else None
            term = _Term(student, sums.student, teacher, sums, divergence)
        self.sums.rows[pair, self.rows] = loss.clamp(max=call.token_clip)
        left_out = loss > call.token_clip if call.token_clip < math.inf else None
        if scaled is None or moment is None:
            return replace(term, left_out=left_out)
        left_out = scaled.constant if left_out is None else scaled.constant | left_out
        correction = scaled.correction(moment, vocab_size)
        return replace(term, left_out=left_out, correction=correction)

    def standardized(self, operand: Operand) -> Standardized:
        tile = tile_for(Sweep.ROW_STATS, operand, extras=True)
        return standardized(operand, self.call.vocab_size, tile)

    def teacher(self, pair: int) -> Operand:
        call = self.call
        teacher = self.teachers[call.teacher_index(pair)]
        norm = teacher.head.norm if call.normed[pair] else None
        return teacher.operand(call.teacher_hidden[pair], self.sums.index, norm)

    def given(self, pair: int, own: bool) -> RowStats | None:
        """Return the teacher's log-sum-exps if they are given, and logits are not standardised."""
        statistics = self.call.teacher_statistics
        if statistics is None or own:
            return None
        return RowStats(*(x.contiguous() for x in statistics[pair, self.rows].unbind(-1)))

    def row_sums(
        self,
        student: Operand,
        teacher: Operand,
        divergence: Divergence,
        given: RowStats | None,
        moment: bool,
    ) -> RowSums:
        vocab_size, beta = self.call.vocab_size, self.call.beta
        if divergence in RELATIVE_ENTROPIES and not moment:
            tile = tile_for(Sweep.ONLINE_KL, student, teacher)
            return online_kl(student, teacher, divergence, vocab_size, tile)
        tile = tile_for(Sweep.ROW_STATS, student, extras=moment)
        student_stats = row_stats(student, vocab_size, tile, entropy=moment)
        tile = tile_for(Sweep.ROW_STATS, teacher)
        teacher_stats = given or row_stats(teacher, vocab_size, tile)
        tile = tile_for(Sweep.ROW_SUMS, student, teacher)
        return row_sums(
            student, teacher, student_stats, teacher_stats, divergence, beta, vocab_size, tile,
            moment,
        )  # fmt: skip

    def cross_entropy(self, student: Operand, term: _Term, labels: Tensor) -> Labels:
        """Store the cross entropy of every row, and return the inputs for its gradient.

        The cross entropy uses temperature 1, and logits that are not standardised.
        """
        call, row, smoothing = self.call, self.call.label_row, self.call.label_smoothing
        stats = term.stats
        if stats is None or call.labels_need_statistics:
            student = student.untempered()
            tile = tile_for(Sweep.ROW_STATS, student, extras=smoothing > 0 or call.reports)
            stats = row_stats(
                student, call.vocab_size, tile, entropy=call.reports, mean=smoothing > 0
            )
        log_q = stats.log_probability(student.logits_at(labels[:, None]))[:, 0]
        lse = stats.maximum + stats.log_sum
        loss, total = -log_q, None
        if smoothing:
            assert stats.mean is not None
            loss = (1 - smoothing) * loss - smoothing * stats.mean
        if call.z_loss:
            loss = loss + call.z_loss * lse.square()
        if smoothing or call.z_loss:
            total = 1 + 2 * call.z_loss * lse
        self.sums.rows[row, self.rows] = loss
        if call.reports:
            assert stats.entropy is not None
            for report in (lse, stats.entropy):
                row += 1
                self.sums.rows[row, self.rows] = report
        weight = self.weight(call.label_row)
        return Labels(labels, stats, weight, total, 1 - smoothing, smoothing / call.vocab_size)

    def weight(self, row: int) -> Tensor:
        """Return a copy of the token weights of one loss term.

        Kernels need contiguous weights, but upstream gradients may be transposed. Triton would also
        compile a kernel for each alignment that slices have.
        """
        return self.sums.weight[row, self.rows].clone(memory_format=torch.contiguous_format)

    def gradients(
        self, pair: int, term: _Term, labels: Labels | None, names: Set[int | str]
    ) -> Tensor | None:
        call, student, weight = self.call, term.student, self.weight(pair)
        if term.left_out is not None:
            weight.masked_fill_(term.left_out, 0.0)
        operands = [student] if term.teacher is None else [student, term.teacher]
        extras = labels is not None or term.targets is not None
        tile = tile_for(Sweep.GRADIENTS, *operands, extras=extras)
        x = student.x.to(self.factor_dtype)
        total: Tensor | None = None
        for columns, out in self.chunks(student, tile):
            gradient_chunk(
                student, term.teacher, term.sums, weight, labels, term.divergence, call.beta,
                call.vocab_size, columns.start, out, tile,
                targets=term.targets, correction=term.correction,
            )  # fmt: skip
            grad = out[:, : columns.stop - columns.start]
            head = student.weight[columns].to(self.factor_dtype)
            d_x = self.sums.add_head_gradients(names, grad, x, head, columns)
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


def tile_for(sweep: Sweep, *operands: Operand, extras: bool = False) -> Tile:
    """Return the block sizes with which a sweep processes these operands.

    ``extras`` is true if the sweep computes more than a divergence needs.
    """
    x = min((operand.x for operand in operands), key=lambda x: x.shape[1])
    parts = [part for o in operands for part in (o.bias, o.softcap, o.temperatures)]
    extras = extras or any(part is not None for part in parts)
    # Tuning runs without these parts and extras. With any of them, a tuned tile may take more
    # registers than a thread has.
    tuned = None if extras else store.lookup(sweep, x.dtype, x.shape[1], x.device)
    return tuned or sizes.default(sweep, sizes.arch_of(x.device), x.dtype, x.shape[1], extras)
