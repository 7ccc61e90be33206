"""What a call would cost before it is made: operations, traffic and workspace of each backend.

All of it is arithmetic on shapes; nothing is measured. Traffic is to and from main memory if every
operand is read once for each sweep or chunk: blocks that do not share a cache read the heads again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lens_kernels import validation as check
from lens_kernels.backends.matmul import multiplies_natively
from lens_kernels.backends.torch_chunked import bytes_per_row, chunk_rows
from lens_kernels.spec import RELATIVE_ENTROPIES, Divergence, parse_name

# Operations in 16 bit that a GPU makes in the time that it takes to move a byte, and how much more
# time others take, by the bytes of a factor. Data sheets give 295 and 15 (float32, H100 SXM), 153
# and 16 (A100 80GB), 164 and 2 (RTX 4090), 247 and 8 (MI300X).
OPERATIONS_PER_BYTE = 200
SLOWER = {2: 1, 4: 10, 8: 20}
# The least that the ``triton`` backend takes of the vocabulary at a time.
COLUMNS = 128


@dataclass(frozen=True)
class Step:
    """One kind of work: floating-point operations of its products, and bytes moved.

    ``factor_bytes`` is the size of a factor of the products.
    """

    name: str
    flops: int
    bytes_moved: int
    factor_bytes: int = 2

    @property
    def cost(self) -> int:
        """Time of the slower of the two on a GPU, in operations of 16-bit factors."""
        return max(self.flops * SLOWER[self.factor_bytes], self.bytes_moved * OPERATIONS_PER_BYTE)


@dataclass(frozen=True)
class Plan:
    """The steps of a backend, and the bytes of the logits, or their gradients, that it holds."""

    backend: str
    steps: tuple[Step, ...]
    workspace_bytes: int

    @property
    def flops(self) -> int:
        """Operations of all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def bytes_moved(self) -> int:
        """Bytes moved by all steps."""
        return sum(step.bytes_moved for step in self.steps)

    @property
    def cost(self) -> int:
        """Time of all steps on a GPU, in operations of 16-bit factors; only good to compare."""
        return sum(step.cost for step in self.steps)


def plan(
    tokens: int,
    vocab_size: int,
    student_width: int,
    teacher_width: int,
    *,
    pairs: int = 1,
    divergence: str = "jsd",
    dtype: torch.dtype = torch.bfloat16,
    head_grad: bool = True,
    hidden_grad: bool = True,
    workspace_bytes: int | None = None,
    device: str = "cuda",
) -> dict[str, Plan]:
    """Return what loss and gradients cost on each backend, and ``"dense"``: all logits at once.

    Args:
        tokens: Tokens that count.
        vocab_size: Entries of the shared vocabulary.
        student_width: The student's hidden size.
        teacher_width: The teacher's.
        pairs: Lens pairs, the final hidden states being one.
        divergence: Its name; the ``triton`` backend needs a sweep less for some.
        dtype: Of hidden states and heads.
        head_grad: Whether the student's head takes a gradient.
        hidden_grad: Whether its hidden states, or its norm, take one.
        workspace_bytes: As for ``symmetric_lens_loss``.
        device: The type of device.

    Raises:
        TypeError, ValueError: A size that is not a positive integer, an unknown divergence, or a
            dtype that is not supported.
    """
    if dtype not in check.FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, check.FLOATS))}, got {dtype}")
    sizes = {"tokens": tokens, "vocab_size": vocab_size, "pairs": pairs}
    sizes |= {"student_width": student_width, "teacher_width": teacher_width}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    one_sweep = parse_name(Divergence, "divergence", divergence) in RELATIVE_ENTROPIES
    where = torch.device(device)
    grads = head_grad, hidden_grad
    shape = _Shape(tokens, vocab_size, student_width, teacher_width, dtype, *grads, where)
    budget = check.workspace(workspace_bytes, where)
    rows = chunk_rows(tokens, shape.bytes_per_row(), budget)
    return {
        "dense": shape.chunked("dense", tokens, pairs),
        "torch": shape.chunked("torch", rows, pairs),
        "triton": shape.swept(one_sweep, budget, pairs),
    }


@dataclass(frozen=True)
class _Shape:
    tokens: int
    vocab: int
    student: int
    teacher: int
    dtype: torch.dtype
    head_grad: bool
    hidden_grad: bool
    device: torch.device

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def factor(self) -> torch.dtype:
        """What torch multiplies: the operands, or where a device cannot, their wide copies."""
        native = multiplies_natively(self.dtype, self.compute, self.device)
        return self.dtype if native else self.compute

    @property
    def logits(self) -> int:
        return self.tokens * self.vocab

    @property
    def projections(self) -> int:
        return 2 * self.logits * (self.student + self.teacher)

    def bytes_per_row(self) -> int:
        return bytes_per_row(self.vocab, self.factor, self.compute)

    def _reads(self, head: int, hidden: int = 1) -> int:
        """Return the bytes of both models' operands, read so many times."""
        both = self.student + self.teacher
        return (hidden * self.tokens + head * self.vocab) * both * self.dtype.itemsize

    def _products(self, made_in: torch.dtype, chunks: int, parts: int) -> Step:
        """Return the products that the logits' gradient enters.

        It is made in a dtype, for each of ``chunks`` of the tokens or ``parts`` of the vocabulary.
        """
        wide, factor = self.compute.itemsize, self.factor.itemsize
        hidden, head = self.tokens * self.student, self.vocab * self.student
        wanted = self.hidden_grad + self.head_grad
        moved = wanted * self.logits * factor
        if made_in is not self.factor:
            moved += self.logits * (made_in.itemsize + factor)  # a copy as a factor
        if self.hidden_grad:
            moved += chunks * head * factor + (2 * parts - 1) * hidden * wide
        if self.head_grad:
            moved += parts * hidden * factor + 2 * chunks * head * wide
        flops = 2 * wanted * self.logits * self.student
        return Step("products of the gradient", flops, moved, factor)

    def chunked(self, name: str, rows: int, pairs: int) -> Plan:
        """Return the plan of chunks of ``rows`` tokens over the whole vocabulary."""
        chunks = math.ceil(self.tokens / rows)
        tile = self.logits * self.compute.itemsize
        wanted = self.hidden_grad or self.head_grad
        reads = self._reads(chunks) + 2 * tile
        steps = [
            Step("projections", self.projections, reads, self.factor.itemsize),
            Step("pointwise pass", 0, (3 if wanted else 2) * tile),
        ]
        if wanted:
            steps.append(self._products(self.compute, chunks, 1))
        workspace = rows * self.bytes_per_row() * (pairs if name == "dense" else 1)
        return self._plan(name, steps, workspace, pairs)

    def swept(self, one_sweep: bool, budget: int, pairs: int) -> Plan:
        """Return the plan of sweeps over tiles of the vocabulary, which project anew each time."""
        tiles = math.ceil(self.vocab / COLUMNS)
        column = self.tokens * COLUMNS * self.dtype.itemsize
        parts = math.ceil(tiles / max(1, budget // column))
        operand, workspace = self.dtype.itemsize, 0
        names = ["log-sum-exps and row sums"] if one_sweep else ["log-sum-exps", "row sums"]
        steps = [Step(name, self.projections, self._reads(1), operand) for name in names]
        if self.hidden_grad or self.head_grad:
            workspace = math.ceil(tiles / parts) * column
            moved = self._reads(1, parts) + self.logits * operand
            steps.append(Step("gradient of the logits", self.projections, moved, operand))
            steps.append(self._products(self.dtype, 1, parts))
        return self._plan("triton", steps, workspace, pairs)

    def _plan(self, name: str, steps: list[Step], workspace: int, pairs: int) -> Plan:
        """Return the plan of steps that every pair takes."""
        every = [
            replace(step, flops=pairs * step.flops, bytes_moved=pairs * step.bytes_moved)
            for step in steps
        ]
        if self.head_grad:
            # Set to zero before and brought to scale after, once for all pairs.
            moved = 3 * self.vocab * self.student * self.compute.itemsize
            every.append(Step("head gradient begun and ended", 0, moved))
        return Plan(name, tuple(every), workspace)
