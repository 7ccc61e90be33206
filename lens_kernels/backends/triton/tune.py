"""The command ``lens-kernels tune``: compare the Triton kernels with torch, and find fast tiles."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lens_kernels.backends.triton import agreement
from lens_kernels.backends.triton.interpreter import INTERPRETING
from lens_kernels.backends.triton.kernels.operands import Operand, aligned
from lens_kernels.backends.triton.tiles import store
from lens_kernels.backends.triton.tiles.search import Outcome, Search, Timer, median_ms


def unsupported_reason() -> str | None:
    """Return the reason why this machine cannot tune, or None."""
    if not torch.cuda.is_available():
        return f"tiles are timed on a GPU, and torch {torch.__version__} finds none"
    if INTERPRETING:
        return "TRITON_INTERPRET is set, so kernels would be interpreted; unset it"
    return None


def tune(
    student_width: int,
    teacher_width: int,
    vocab_size: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cuda",
    timer: Timer = median_ms,
    say: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Find and store the fastest tile of every sweep for a problem of these sizes.

    The kernels are first compared with the ``torch`` backend. The search itself compares each tile
    only with the default tile.

    Args:
        student_width: Hidden size of the student.
        teacher_width: Hidden size of the teacher.
        vocab_size: Vocabulary size.
        tokens: Tokens of a call that are not masked.
        dtype: Dtype of hidden states and heads.
        device: The GPU, which must be the current one.
        timer: Returns the milliseconds that a function takes.
        say: Called with each line of progress.

    Returns:
        The outcome of each sweep, and of sweep 1 for each hidden size.

    Raises:
        RuntimeError: The kernels give wrong results on this GPU, or no tile of a sweep runs.
        OSError: The results cannot be stored.
    """
    store.check_writable()
    device = torch.device(device)
    say("comparing the kernels with the torch backend")
    agreement.check(student_width, teacher_width, vocab_size, tokens, dtype, device)
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, width: int, scale: float) -> Tensor:
        x = torch.randn((rows, width), generator=generator, device=device)
        return aligned(x.mul_(scale).to(dtype))

    def operand(width: int) -> Operand:
        # Scale the head so that distributions are neither flat nor one-hot.
        head = random(vocab_size, width, 1.5 / math.sqrt(width))
        return Operand(random(tokens, width, 1.0), head, None, 1.0, None, 1.0)

    return Search(operand(student_width), operand(teacher_width), vocab_size, timer, say).run()
