"""The bytes that a rank sends and holds in a training step, counted from the sizes of the call.

Nothing here is measured. A step is one forward and backward pass over the tokens of a rank. Weights
are gathered in the dtype of the call, and the student's gradients are reduced in float32. In a ring
of ``world`` ranks, each rank sends ``(world - 1) / world`` of a tensor to gather or scatter it, and
twice as much to reduce it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lens_kernels.cost import CallShape, Plan, layout_of, row_chunks

# Bytes per trained parameter: float32 weight, its gradient, and two moments of Adam.
TRAINED = 16


@dataclass(frozen=True)
class Collective:
    """The collectives of one kind in a step: their number, and the bytes of their whole tensors.

    ``count`` is None if the number depends on settings of the engine, such as bucket sizes.
    """

    name: str
    kind: str
    count: int | None
    tensor_bytes: int

    def sent(self, world: int) -> int:
        """Return the bytes that each of ``world`` ranks sends."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.tensor_bytes * (world - 1) // world


@dataclass(frozen=True)
class SharedPlan(Plan):
    """The plan of a call on one of ``world`` ranks, with the collectives of the whole step.

    ``held_bytes`` counts the student's weights, gradients and optimizer state, the teacher's
    weights, and the memory of the loss. It leaves out activations.
    """

    world: int
    collectives: tuple[Collective, ...]
    held_bytes: int

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends in a step."""
        return sum(x.sent(self.world) for x in self.collectives)


def shared_plans(
    shape: CallShape, world: int, student_parameters: int | None, teacher_parameters: int | None
) -> dict[str, SharedPlan]:
    """Return the plans of DDP, FSDP2, ZeRO-3, and FSDP2 with a vocabulary over all ranks."""
    head = shape.vocab_size * shape.student_width
    teacher_head = shape.vocab_size * shape.teacher_width
    student = head if student_parameters is None else student_parameters
    teacher = teacher_head if teacher_parameters is None else teacher_parameters
    wide, narrow = 4, shape.dtype.itemsize
    whole, part = row_chunks(shape), row_chunks(_shape(shape, world))

    def gradients(columns: int) -> int:
        """Return the bytes of the float32 gradients that the loss computes."""
        hidden = shape.pairs * shape.tokens * shape.hidden_grad
        return wide * shape.student_width * (columns * shape.head_grad + hidden)

    def make(plan: Plan, held: int, columns: int, *collectives: Collective) -> SharedPlan:
        sent = tuple(x for x in collectives if x.tensor_bytes)
        total = held + plan.workspace_bytes + gradients(columns)
        return SharedPlan(plan.backend, plan.steps, plan.workspace_bytes, world, sent, total)

    reduced = Collective("student's gradients", "reduce_scatter", None, wide * student)
    frozen = Collective("teacher", "all_gather", None, narrow * teacher)
    rest, both = student - head, narrow * (head + teacher_head)
    sharded = (TRAINED * student + narrow * teacher) // world
    columns = -(-shape.vocab_size // world)

    def gathered(passes: int, parameters: int, name: str) -> Collective:
        return Collective(name, "all_gather", None, passes * narrow * parameters)

    return {
        "ddp": make(
            whole, TRAINED * student + narrow * teacher, shape.vocab_size,
            Collective("student's gradients", "all_reduce", None, wide * student),
        ),
        "fsdp2": make(
            whole, sharded + both, shape.vocab_size,
            gathered(2, rest, "student, forward and backward"),
            gathered(1, head, "student's head, once"), frozen, reduced,
        ),
        "zero3": make(
            whole, sharded + both, shape.vocab_size,
            gathered(2, student, "student, forward and backward"), frozen, reduced,
        ),
        "vocabulary": make(
            part, sharded, columns,
            gathered(2, rest, "student, forward and backward"),
            gathered(1, teacher - teacher_head, "teacher"),
            replace(reduced, tensor_bytes=wide * rest), *reductions(shape, world),
        ),
    }  # fmt: skip


def reductions(shape: CallShape, world: int) -> list[Collective]:
    """Return the reductions of a call with ``process_group``, without labels or adaptive KL."""
    part = _shape(shape, world)
    _, tiles = layout_of(part).counts(shape.pairs, shape.tokens)
    size, models = shape.compute_dtype.itemsize, 1 + bool(shape.teacher_width)
    rows = shape.pairs * shape.tokens * size
    hidden = rows * shape.student_width * shape.hidden_grad
    return [
        Collective("maxima of logits", "all_reduce", tiles, models * rows),
        Collective("sums of exponentials", "all_reduce", tiles, models * rows),
        Collective("sums of f and h", "all_reduce", tiles, 2 * rows),
        Collective("gradients of hidden states", "all_reduce", shape.pairs, hidden),
    ]


def _shape(shape: CallShape, world: int) -> CallShape:
    """Return the shape of the call on the rank with the most vocabulary entries."""
    columns = -(-shape.vocab_size // world)
    return replace(shape, vocab_size=columns, sharded=True, one_read=False)
