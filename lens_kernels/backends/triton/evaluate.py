"""The order of the sweeps, and what becomes of their results."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lens_kernels.backends import matmul
from lens_kernels.backends.ledger import Ledger
from lens_kernels.backends.tile_pass import FLOOR
from lens_kernels.backends.triton import interpreter, tiles, tuned
from lens_kernels.backends.triton.gradients import Labels, gradient_chunk
from lens_kernels.backends.triton.norm import norm_backward, norm_rows
from lens_kernels.backends.triton.online_kl import online_kl
from lens_kernels.backends.triton.operands import Operand, RowStats, RowSums, aligned
from lens_kernels.backends.triton.row_stats import row_stats
from lens_kernels.backends.triton.row_sums import row_sums
from lens_kernels.backends.triton.tiles import Sweep, Tile
from lens_kernels.call import Evaluation, LossCall
from lens_kernels.lens import LensHead, LensNorm
from lens_kernels.spec import RELATIVE_ENTROPIES, Divergence


def evaluate(call: LossCall) -> Evaluation:
    """Return the rows of the call and the gradients of its loss."""
    if interpreter.INTERPRETING:
        interpreter.mend_bfloat16()
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(call.row_weight):
        run = _Run(call)
        if run.ledger.tokens:
            for pair in range(len(call.student_hidden)):
                run.pair(pair)
        return run.ledger.result()


class _Side:
    """One model's head, laid out for the sweeps."""

    def __init__(self, head: LensHead, call: LossCall) -> None:
        self.head = head.prefix(call.spec.vocab_size)
        self.dtype = call.operand_dtype or head.weight.dtype
        self.weight = aligned(self.head.weight.to(self.dtype))
        self.temperature = call.spec.temperature

    def operand(self, hidden: Tensor, index: Tensor | None, norm: LensNorm | None) -> Operand:
        """Return the rows of ``hidden`` at ``index``, normed if they are to be, with the head."""
        if norm is not None:
            x = norm_rows(hidden, index, norm, self.dtype)
        else:
            x = aligned((hidden if index is None else hidden[index]).to(self.dtype))
        bias = None if self.head.bias is None else self.head.bias.contiguous()
        return Operand(x, self.weight, bias, self.head.scale, self.head.softcap, self.temperature)


class _Run:
    """One call."""

    def __init__(self, call: LossCall) -> None:
        self.call = call
        self.ledger = Ledger(call, torch.float32)
        self.every = slice(None) if self.ledger.index is None else self.ledger.index
        self.student = _Side(call.student_head, call)
        self.teacher = _Side(call.teacher_head, call)
        # What the gradient products multiply: 16 bit where the device does so into fp32.
        dtype, device = self.student.dtype, call.row_weight.device
        native = matmul.multiplies_natively(dtype, torch.float32, device)
        self.factor = dtype if native else torch.float32

    def pair(self, pair: int) -> None:
        """Do all the work of one pair of hidden states."""
        call, ledger, spec = self.call, self.ledger, self.call.spec
        hidden = call.student_hidden[pair]
        norm = self.student.head.norm if spec.normed[pair] else None
        student = self.student.operand(hidden, ledger.index, norm)
        teacher_norm = self.teacher.head.norm if spec.normed[pair] else None
        teacher = self.teacher.operand(call.teacher_hidden[pair], ledger.index, teacher_norm)
        sums = self.sums(student, teacher, spec.divergences[pair])
        ledger.rows[pair, self.every] = sums.f
        labels = None
        if call.labels is not None and pair == len(call.student_hidden) - 1:
            labels = self.cross_entropy(student, sums.student, call.labels[self.every])
        wanted = ledger.wanted(pair, norm is not None)
        if not wanted:
            return
        d_x = self.gradients(pair, student, teacher, sums, labels, wanted)
        if d_x is None:
            return
        if norm is not None:
            parts = [ledger.grads.get(key) for key in (pair, "norm_weight", "norm_bias")]
            norm_backward(d_x, hidden, ledger.index, norm, *parts)
        else:
            ledger.grads[pair][self.every] = d_x

    def sums(self, student: Operand, teacher: Operand, divergence: Divergence) -> RowSums:
        """Run sweeps 1 and 2."""
        vocab_size, beta = self.call.spec.vocab_size, self.call.spec.beta
        if divergence in RELATIVE_ENTROPIES:
            tile = self.tile(Sweep.ONLINE_KL, student, teacher)
            return online_kl(student, teacher, divergence, vocab_size, tile)
        student_stats = row_stats(student, vocab_size, self.tile(Sweep.ROW_STATS, student))
        teacher_stats = row_stats(teacher, vocab_size, self.tile(Sweep.ROW_STATS, teacher))
        tile = self.tile(Sweep.ROW_SUMS, student, teacher)
        return row_sums(
            student, teacher, student_stats, teacher_stats, divergence, beta, vocab_size, tile
        )

    def cross_entropy(self, student: Operand, stats: RowStats, labels: Tensor) -> Labels:
        """Store the cross entropy of every row, and return what its gradient needs."""
        if student.temperature != 1.0:
            student = student.untempered()
            tile = self.tile(Sweep.ROW_STATS, student)
            stats = row_stats(student, self.call.spec.vocab_size, tile)
        log_q = student.logits_at(labels).clamp(min=FLOOR) - stats.maximum - stats.log_sum
        self.ledger.rows[-1, self.every] = -log_q
        return Labels(labels, stats, self.weight(-1))

    def weight(self, row: int) -> Tensor:
        """Return the weights of a row of the ledger, as a copy.

        An upstream gradient may be a transpose, and kernels know no stride of it; a slice may begin
        at any address, for which kernels would be compiled anew.
        """
        return self.ledger.weight[row, self.every].clone(memory_format=torch.contiguous_format)

    def gradients(
        self,
        pair: int,
        student: Operand,
        teacher: Operand,
        sums: RowSums,
        labels: Labels | None,
        wanted: set[int | str],
    ) -> Tensor | None:
        """Run sweep 3 chunk by chunk, and return the gradient of the rows, if wanted."""
        spec = self.call.spec
        tile = self.tile(Sweep.GRADIENTS, student, teacher, labels=labels is not None)
        weight, x = self.weight(pair), student.x.to(self.factor)
        total: Tensor | None = None
        for columns, out in self.chunks(student, tile):
            gradient_chunk(
                student, teacher, sums, weight, labels, spec.divergences[pair], spec.beta,
                spec.vocab_size, columns.start, out, tile,
            )  # fmt: skip
            grad = out[:, : columns.stop - columns.start]
            head = student.weight[columns].to(self.factor)
            d_x = self.ledger.head_gradients(wanted, grad, x, head, columns)
            if d_x is not None:
                total = d_x if total is None else total.add_(d_x)
        return total

    def chunks(self, student: Operand, tile: Tile) -> Iterator[tuple[slice, Tensor]]:
        """Yield chunks of the vocabulary, each with the workspace for its gradient."""
        vocab_size = self.call.spec.vocab_size
        tiles_in_all = -(-vocab_size // tile.block_v)
        bytes_per_tile = student.tokens * tile.block_v * student.x.element_size()
        limit = max(1, self.call.spec.workspace_bytes // bytes_per_tile)
        number = -(-tiles_in_all // limit)
        step = -(-tiles_in_all // number) * tile.block_v
        out = student.x.new_empty(student.tokens, step)
        for start in range(0, vocab_size, step):
            yield slice(start, min(start + step, vocab_size)), out

    def tile(self, sweep: Sweep, *sides: Operand, labels: bool = False) -> tiles.Tile:
        """Return the tile with which a sweep reads these operands."""
        x = min((side.x for side in sides), key=lambda x: x.shape[1])
        rich = labels or any(side.bias is not None or side.softcap is not None for side in sides)
        # What was tuned is plain, and might not fit into the registers that are left here.
        tile = None if rich else tuned.lookup(sweep, x.dtype, x.shape[1], x.device)
        return tile or tiles.choose(sweep, tiles.arch_of(x.device), x.dtype, x.shape[1], rich)
