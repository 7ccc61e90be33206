"""The cost of a call on each backend: operations, memory traffic and workspace.

Costs are counted from the sizes of the call, and not measured. Memory traffic is the number of
bytes that are read from main memory and written to it. Each GEMM is assumed to read its operands
once. Only data smaller than a GPU's cache is assumed to stay in the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lens_kernels.backends.matmul import multiplies_natively
from lens_kernels.backends.row_groups import operand_reads
from lens_kernels.backends.torch import clusters
from lens_kernels.backends.torch.layout import (
    Layout,
    apart,
    bytes_per_row,
    has_row_kernel,
    in_place,
    row_stride,
)
from lens_kernels.call import LossCall
from lens_kernels.options import RELATIVE_ENTROPIES, Divergence

# The number of 16-bit operations that a GPU executes while it moves one byte. Data sheets give 295
# (H100 SXM), 153 (A100 80GB), 164 (RTX 4090) and 247 (MI300X).
OPERATIONS_PER_BYTE = 200
# The time of an operation on elements of 2, 4 or 8 bytes, in units of a 16-bit operation. For
# float32, data sheets give 15 (H100 SXM), 16 (A100 80GB), 2 (RTX 4090) and 8 (MI300X).
RELATIVE_TIME = {2: 1, 4: 10, 8: 20}
# How much longer a GEMM takes inside a sweep than in a library, estimated from the bytes that the
# sweep reads.
SWEEP_TIME = 2
# The smallest number of vocabulary entries in a chunk of the ``triton`` backend.
COLUMNS = 128
# The number of entries that the row kernel reads at a time.
GROUP = 8
# How many values Inductor's kernels move on a GPU for each logit of a model: two for the losses,
# and two more for the gradient. Counted in their code, in
# benchmarks/data/offline/inductor_pass.csv.
INDUCTOR_VALUES = 2
# How many more values the ghost entry of sparse targets moves: for losses, and with gradients. The
# probabilities and the places of the listed entries are stored and read again.
GHOST_VALUES = 2, 5


@dataclass(frozen=True)
class Step:
    """A step of a backend: the floating-point operations of its GEMMs, and the bytes that it moves.

    ``factor_bytes`` is the size of an element of the GEMMs' factors. ``product_time`` is the time
    of the GEMMs, in units of the time of a library's GEMMs.
    """

    name: str
    flops: int
    bytes_moved: int
    factor_bytes: int = 2
    product_time: int = 1

    @property
    def cost(self) -> int:
        """The time of the step on a GPU, in units of one 16-bit operation.

        The time is that of the arithmetic or of the memory traffic, whichever is longer.
        """
        arithmetic = self.flops * RELATIVE_TIME[self.factor_bytes] * self.product_time
        return max(arithmetic, self.bytes_moved * OPERATIONS_PER_BYTE)

    def times(self, number: int) -> Step:
        """Return a step with ``number`` times as many operations and bytes."""
        return replace(self, flops=number * self.flops, bytes_moved=number * self.bytes_moved)


@dataclass(frozen=True)
class Plan:
    """The counted cost of a call on a backend. Nothing is measured.

    Attributes:
        backend: Name of the backend, or ``"dense"``.
        steps: The parts of the work, each with its operations and the bytes that it moves.
        workspace_bytes: Largest number of bytes of logits and their gradients in memory.
    """

    backend: str
    steps: tuple[Step, ...]
    workspace_bytes: int

    @property
    def flops(self) -> int:
        """The floating-point operations of all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def bytes_moved(self) -> int:
        """The bytes that all steps move."""
        return sum(step.bytes_moved for step in self.steps)

    @property
    def cost(self) -> int:
        """The estimated time of all steps on a GPU, in units of one 16-bit operation."""
        return sum(step.cost for step in self.steps)


@dataclass(frozen=True)
class CallShape:
    """The sizes and properties of a call that decide its cost.

    ``divergences`` has one entry for each lens pair. ``dtype`` is the dtype of heads and hidden
    states in GEMMs. ``teacher_width`` is 0 without a teacher, and the largest width of several
    teachers. ``sharded`` is true if this rank holds only a slice of the vocabulary. ``one_read`` is
    true if a cluster of GPU programs can hold a row of logits. ``features`` and ``standardized``
    are those of ``LossCall``. ``head_dtype`` is the dtype of the student's head and its gradient,
    if it is not ``dtype``. ``listed`` is the number of sparse targets of a token, and ``ghost`` is
    true if they have a ghost entry. If other pairs have a teacher, every pair is counted with both.
    ``label_sweep`` is true if the labels beside a divergence need a sweep of their own.
    """

    tokens: int
    vocab_size: int
    student_width: int
    teacher_width: int
    divergences: tuple[Divergence, ...]
    dtype: torch.dtype
    compute_dtype: torch.dtype
    head_grad: bool
    hidden_grad: bool
    device: torch.device
    workspace_bytes: int
    teacher_statistics: bool = False
    sharded: bool = False
    one_read: bool = False
    features: tuple[str, ...] = ()
    head_dtype: torch.dtype | None = None
    standardized: tuple[bool, ...] = ()
    listed: int = 0
    ghost: bool = False
    label_sweep: bool = False

    @staticmethod
    def of(call: LossCall) -> CallShape:
        """Return the shape of a call. Masked tokens are counted like unmasked tokens."""
        head, with_grad = call.student_head.weight, call.needing_grad()
        return CallShape(
            tokens=call.row_weight.shape[-1],
            vocab_size=call.vocab_size,
            student_width=head.shape[1],
            teacher_width=max([head.weight.shape[1] for head in call.teacher_heads], default=0),
            divergences=call.divergences,
            dtype=call.operand_dtype or head.dtype,
            compute_dtype=call.compute_dtype,
            head_grad="weight" in with_grad,
            hidden_grad=any(key not in ("weight", "bias") for key in with_grad),
            device=call.row_weight.device,
            workspace_bytes=call.workspace_bytes,
            teacher_statistics=call.teacher_statistics is not None,
            sharded=bool(call.group),
            one_read=clusters.for_call(call) is not None,
            features=call.features(),
            head_dtype=head.dtype,
            standardized=call.standardized,
            listed=0 if call.targets is None else call.targets.ids.shape[-1],
            ghost=call.targets is not None and call.targets.rest is not None,
            label_sweep=call.labels_need_statistics and bool(call.divergences),
        )

    @property
    def pairs(self) -> int:
        """Return the number of lens pairs, or 1 for a call with labels only."""
        return max(1, len(self.divergences))

    @property
    def factor(self) -> torch.dtype:
        """Return the dtype of GEMM factors: ``dtype``, or float32 if the device needs it."""
        native = multiplies_natively(self.dtype, self.compute_dtype, self.device)
        return self.dtype if native else self.compute_dtype

    @property
    def head_grad_dtype(self) -> torch.dtype | None:
        """The dtype of the head's gradient, or None if it needs none."""
        return (self.head_dtype or self.dtype) if self.head_grad else None

    @property
    def logits(self) -> int:
        """The number of logits of one model, for one lens pair."""
        return self.tokens * self.vocab_size

    @property
    def projections(self) -> int:
        """The number of operations that compute the logits of both models, for one lens pair."""
        return 2 * self.logits * (self.student_width + self.teacher_width)

    @property
    def with_grad(self) -> bool:
        """Whether logit gradients are needed."""
        return self.hidden_grad or self.head_grad

    def row_kernel_bytes(self, models: int) -> int:
        """Return the bytes that the row kernel moves: each sweep's logits, and the gradients."""
        standardized = self.standardized or (False,) * self.pairs
        terms = zip(self.divergences or (None,), standardized, strict=True)
        reads = sum(self._reads_of_row(divergence, own, models) for divergence, own in terms)
        entries = self.tokens * math.ceil(self.vocab_size / GROUP) * GROUP
        gradients = self.pairs * self.factor.itemsize if self.with_grad else 0
        moved = entries * (reads * self.compute_dtype.itemsize + gradients)
        # A sparse target is an id, a probability and a logit. With gradients, the kernel reads it
        # once more, and writes the gradient there again.
        target = torch.int64.itemsize + 2 * self.compute_dtype.itemsize
        target = 2 * target + self.factor.itemsize if self.with_grad else target
        return moved + self.pairs * self.tokens * self.listed * target

    def _reads_of_row(self, divergence: Divergence | None, standardized: bool, models: int) -> int:
        """Return how many rows of logits the row kernel reads for a row of a pair."""
        if self.one_read and not standardized and not self.listed:
            return models
        # The row kernel skips its second sweep for relative entropies and for labels. Over several
        # ranks, relative entropies need it.
        online = divergence is None or (divergence in RELATIVE_ENTROPIES and not self.sharded)
        sweeps = 2 - online + self.with_grad
        if standardized:
            # One more sweep computes means and deviations, and another one a sum for the gradient.
            return models * (sweeps + 1 + self.with_grad)
        # With the teacher's statistics, the first sweep reads only the student's logits.
        given = self.teacher_statistics and not self.sharded and not online
        return models * sweeps - given

    def bytes_per_row(self) -> int:
        """Return how many bytes the tiles of the ``torch`` backend need for each token."""
        return bytes_per_row(self.vocab_size, self.factor, self.compute_dtype)

    def operand_bytes(self, head_reads: int, hidden_reads: int = 1) -> int:
        """Return the bytes of all reads of a lens pair's heads and hidden states."""
        both = self.student_width + self.teacher_width
        rows = hidden_reads * self.tokens + head_reads * self.vocab_size
        return rows * both * self.dtype.itemsize

    def sweep_bytes(self, width: int, parts: int = 1) -> int:
        """Return the bytes of the operands that a sweep reads.

        ``width`` is the hidden size. The sweep processes the vocabulary in ``parts``.
        """
        row = width * self.dtype.itemsize
        hidden, head = operand_reads(self.tokens, self.vocab_size, row, parts)
        return (hidden * self.tokens + head * self.vocab_size) * row

    def gradient_products(self, made_in: torch.dtype, chunks: int, parts: int) -> list[Step]:
        """Return the steps of the GEMMs that multiply logit gradients by head and hidden states.

        Logit gradients are computed in the dtype ``made_in``, in ``chunks`` of the rows, or for
        each pair in ``parts`` of the vocabulary. The first GEMM overwrites the head gradient, and
        later GEMMs add to it.
        """
        wide, factor = self.compute_dtype.itemsize, self.factor.itemsize
        logits, head = self.pairs * self.logits, self.vocab_size * self.student_width
        hidden = self.pairs * self.tokens * self.student_width
        flops = 2 * logits * self.student_width
        steps = []
        if made_in is not self.factor:
            # Logit gradients are first copied to the dtype of the factors.
            steps.append(Step("logit gradients cast", 0, logits * (made_in.itemsize + factor)))
        if self.hidden_grad:
            moved = (logits + chunks * head) * factor + (2 * parts - 1) * hidden * wide
            steps.append(Step("hidden gradients", flops, moved, factor))
        if self.head_grad:
            moved = (logits + parts * hidden) * factor + (2 * chunks - 1) * head * wide
            steps.append(Step("head gradient", flops, moved, factor))
        return steps

    def plan(self, name: str, steps: list[Step], workspace: int) -> Plan:
        """Return the plan of ``steps``, and of the steps that all backends have in common."""
        dtype, wide = self.head_grad_dtype, self.compute_dtype.itemsize
        if dtype is not None:
            # The head gradient is multiplied by the upstream gradient, and copied to the head's
            # dtype. With float16 factors, it is first multiplied by the accumulator's unit.
            each = 2 * wide + (wide + dtype.itemsize if dtype is not self.compute_dtype else 0)
            each += 2 * wide if self.factor is torch.float16 else 0
            moved = self.vocab_size * self.student_width * each
            steps = [*steps, Step("head gradient scaled and cast", 0, moved)]
        return Plan(name, tuple(steps), workspace)


def dense(shape: CallShape) -> Plan:
    """Return the plan of a computation that holds all logits in memory, as no backend does."""
    workspace = shape.tokens * shape.bytes_per_row() * shape.pairs
    return _row_chunks("dense", shape, Layout(shape.tokens, shape.tokens), workspace)


def row_chunks(shape: CallShape, layout: Layout | None = None) -> Plan:
    """Return the plan of the ``torch`` backend: tiles of tokens over the whole vocabulary.

    By default, ``layout`` is that of the backend.
    """
    layout = layout or layout_of(shape)
    if layout.grad_stride is None:
        return _row_chunks("torch", shape, layout, layout.tile_rows * shape.bytes_per_row())
    tile = layout.sets * layout.tile_rows * row_stride(shape.vocab_size)
    workspace = tile * (1 + bool(shape.teacher_width)) * shape.compute_dtype.itemsize
    if shape.with_grad:
        workspace += layout.grad_rows * layout.grad_stride * shape.factor.itemsize
    return _row_chunks("torch", shape, layout, workspace)


def layout_of(shape: CallShape) -> Layout:
    """Return the layout of tiles in the ``torch`` backend."""
    if has_row_kernel(shape.device, shape.compute_dtype, shape.features, shape.sharded):
        rows = shape.pairs * shape.tokens
        sizes = rows, shape.vocab_size, shape.factor, shape.workspace_bytes
        return apart(*sizes, shape.head_grad_dtype, shape.sharded)
    return in_place(shape.tokens, shape.bytes_per_row(), shape.workspace_bytes)


def _row_chunks(name: str, shape: CallShape, layout: Layout, workspace: int) -> Plan:
    steps, tiles = layout.counts(shape.pairs, shape.tokens)
    models = 1 + bool(shape.teacher_width)
    logits = shape.pairs * shape.logits * shape.compute_dtype.itemsize
    rows = shape.pairs * shape.operand_bytes(0)
    reads = rows + tiles * shape.operand_bytes(1, 0) + models * logits
    flops = shape.pairs * shape.projections
    made = [Step("projections", flops, reads, shape.factor.itemsize)]
    if layout.grad_stride is None:
        # On a CPU, a block of logits stays in the cache.
        values = models + shape.with_grad
        if name == "torch" and shape.device.type == "cuda":
            values = INDUCTOR_VALUES * models * (1 + shape.with_grad)
            values += GHOST_VALUES[shape.with_grad] if shape.ghost else 0
        moved = values * logits
        made_in = shape.compute_dtype
    else:
        moved, made_in = shape.row_kernel_bytes(models), shape.factor
    made.append(Step("pointwise pass", 0, moved))
    if shape.with_grad:
        made += shape.gradient_products(made_in, steps, 1)
    return shape.plan(name, made, workspace)


def vocabulary_sweeps(shape: CallShape) -> Plan:
    """Return the plan of the ``triton`` backend, whose sweeps compute all logits again.

    Before the sweep of the gradient, a relative entropy or a cross entropy needs one sweep, and any
    other divergence needs two. Standardised logits need one more. For their gradient, a relative
    entropy between two models needs two sweeps too. Labels need one more if their logits have
    another temperature, are not standardised, or are smoothed or reported.
    """
    tiles = math.ceil(shape.vocab_size / COLUMNS)
    operand = shape.dtype.itemsize
    column = max(1, shape.tokens * COLUMNS * operand)
    parts = math.ceil(tiles / max(1, shape.workspace_bytes // column))
    widths = shape.student_width, shape.teacher_width
    both = shape.projections, shape.sweep_bytes(sum(widths))
    standardized = shape.standardized or (False,) * shape.pairs
    own_sums = shape.with_grad and shape.teacher_width > 0
    two_sweeps = [
        own
        for divergence, own in zip(shape.divergences, standardized, strict=False)
        if divergence not in RELATIVE_ENTROPIES or (own and own_sums)
    ]

    def alone(widths: tuple[int, ...]) -> tuple[int, int]:
        """Return the operations and bytes of one sweep for each model."""
        return 2 * shape.logits * sum(widths), sum(map(shape.sweep_bytes, widths))

    given = widths[:1] if shape.teacher_statistics else widths
    sweeps = (
        ("means and deviations", alone(widths), sum(standardized)),
        ("log-sum-exps of standardised logits", alone(widths), sum(two_sweeps)),
        ("log-sum-exps", alone(given), len(two_sweeps) - sum(two_sweeps)),
        ("row sums", both, len(two_sweeps)),
        ("log-sum-exps and row sums", both, shape.pairs - len(two_sweeps)),
        ("log-sum-exps for the labels", alone(widths[:1]), shape.label_sweep),
    )
    steps = [
        Step(name, *each, operand, SWEEP_TIME).times(number)
        for name, each, number in sweeps
        if number
    ]
    listed = shape.pairs * shape.tokens * shape.listed
    wide = shape.compute_dtype.itemsize
    if listed:
        # A sparse target is an id and a probability, and a logit is written for it.
        moved = listed * (shape.student_width * operand + torch.int64.itemsize + 2 * wide)
        steps.append(Step("logits of the targets", 2 * listed * shape.student_width, moved, wide))
    workspace = 0
    if shape.with_grad:
        workspace = math.ceil(tiles / parts) * column
        moved = shape.sweep_bytes(sum(widths), parts) + shape.logits * operand
        moved += parts * shape.tokens * shape.listed * (torch.int32.itemsize + wide)
        gradient = Step("gradient of the logits", shape.projections, moved, operand, SWEEP_TIME)
        steps += [
            gradient.times(shape.pairs),
            *shape.gradient_products(shape.dtype, shape.pairs, parts),
        ]
    return shape.plan("triton", steps, workspace)
