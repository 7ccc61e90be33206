"""What a call would cost before it is made: operations, traffic and workspace of each backend.

All of it is arithmetic on shapes; nothing is measured. Traffic is to and from main memory if every
operand is read once for each sweep or chunk: blocks that do not share a cache read the heads again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lens_kernels import validation as check
from lens_kernels.backends.matmul import multiplies_natively
from lens_kernels.backends.torch_chunked import bytes_per_row, chunk_rows
from lens_kernels.spec import RELATIVE_ENTROPIES, Divergence, parse_name

# Operations that a device makes in the time that it takes to move a byte, by the bytes of a factor.
# Data sheets give, in 16 bit and in 32: H100 SXM 295 and 20, A100 80GB 153 and 10, RTX 4090 164 and
# 82, MI300X 247 and 31.
OPERATIONS_PER_BYTE = {2: 200, 4: 20, 8: 10}


@dataclass(frozen=True)
class Step:
    """One kind of work: floating-point operations of its products, and bytes moved."""

    name: str
    flops: int
    bytes_moved: int


@dataclass(frozen=True)
class Plan:
    """The steps of a backend, and the most bytes it holds beside inputs and gradients."""

    backend: str
    steps: tuple[Step, ...]
    workspace_bytes: int
    operations_per_byte: int  # of the device

    @property
    def cost(self) -> int:
        """Time in operations: of each step its own, or what could be made while it moves bytes."""
        balance = self.operations_per_byte
        return sum(max(step.flops, step.bytes_moved * balance) for step in self.steps)

    @property
    def flops(self) -> int:
        """Operations of all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def bytes_moved(self) -> int:
        """Bytes moved by all steps."""
        return sum(step.bytes_moved for step in self.steps)


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
        workspace_bytes: As for ``symmetric_lens_loss``.
        device: The type of device.

    Raises:
        TypeError, ValueError: A size that is not a positive integer, or an unknown divergence.
    """
    sizes = {"tokens": tokens, "vocab_size": vocab_size, "pairs": pairs}
    sizes |= {"student_width": student_width, "teacher_width": teacher_width}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    one_sweep = parse_name(Divergence, "divergence", divergence) in RELATIVE_ENTROPIES
    where = torch.device(device)
    shape = _Shape(tokens, vocab_size, student_width, teacher_width, dtype, head_grad, where)
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
    device: torch.device

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def bytes_per_row(self) -> int:
        native = multiplies_natively(self.dtype, self.compute, self.device)
        return bytes_per_row(self.vocab, self.dtype if native else self.compute, self.compute)

    def _reads(self, chunks: int) -> int:
        """Return the bytes of both models' operands, the heads being read for every chunk."""
        both = self.student + self.teacher
        return (self.tokens + chunks * self.vocab) * both * self.dtype.itemsize

    def _gradients(self, chunks: int) -> tuple[int, int]:
        """Return operations and bytes of the products that the logits' gradient enters."""
        head = 1 if self.head_grad else 0
        flops = 2 * self.tokens * self.vocab * self.student * (1 + head)
        moved = self.tokens * self.student * (self.dtype.itemsize + self.compute.itemsize)
        moved += chunks * self.vocab * self.student * self.dtype.itemsize
        # The head's gradient is read and written anew for every chunk but the first.
        moved += head * (2 * chunks - 1) * self.vocab * self.student * self.compute.itemsize
        return flops, moved

    def chunked(self, name: str, rows: int, pairs: int) -> Plan:
        """Return the plan of chunks of ``rows`` tokens over the whole vocabulary."""
        chunks = math.ceil(self.tokens / rows)
        logits = self.tokens * self.vocab
        tile = logits * self.compute.itemsize
        project = 2 * logits * (self.student + self.teacher)
        flops, moved = self._gradients(chunks)
        steps = (
            Step("projections", project, self._reads(chunks) + 2 * tile),
            Step("pointwise pass", 0, 3 * tile),
            Step("products of the gradient", flops, moved + 2 * tile),
        )
        workspace = rows * self.bytes_per_row() * (pairs if name == "dense" else 1)
        return self._plan(name, steps, workspace, pairs)

    def swept(self, one_sweep: bool, budget: int, pairs: int) -> Plan:
        """Return the plan of sweeps over tiles of the vocabulary, which project anew each time."""
        logits = self.tokens * self.vocab
        project, reads = 2 * logits * (self.student + self.teacher), self._reads(1)
        gradient = logits * self.dtype.itemsize
        flops, moved = self._gradients(1)
        if one_sweep:
            first = [Step("log-sum-exps and row sums", project, reads)]
        else:
            first = [Step("log-sum-exps", project, reads), Step("row sums", project, reads)]
        steps = (
            *first,
            Step("gradient of the logits", project, reads + gradient),
            Step("products of the gradient", flops, moved + 2 * gradient),
        )
        return self._plan("triton", steps, min(budget, gradient), pairs)

    def _plan(self, name: str, steps: tuple[Step, ...], workspace: int, pairs: int) -> Plan:
        """Return the plan of steps that every pair takes."""
        all_pairs = [Step(x.name, pairs * x.flops, pairs * x.bytes_moved) for x in steps]
        balance = OPERATIONS_PER_BYTE[self.dtype.itemsize]
        return Plan(name, tuple(all_pairs), workspace, balance)
