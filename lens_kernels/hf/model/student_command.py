"""The ``lens-kernels student`` command: a smaller copy of a teacher, saved as a model folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lens_kernels.hf.model.anatomy import blocks_of
from lens_kernels.hf.model.loading import load_model, load_tokenizer
from lens_kernels.hf.model.student import shallow_copy


def make_student(
    teacher: str,
    output: Path,
    *,
    blocks: Sequence[str] | None = None,
    num_blocks: int | None = None,
    dtype: str = "auto",
    allow_download: bool = False,
    say: Callable[[str], None],
) -> None:
    """Make a student from some of a teacher's blocks, with the teacher's embeddings and head.

    Args:
        teacher: Folder or Hub name of the teacher.
        output: Folder for the student; it must be empty or missing.
        blocks: Blocks to keep, such as 1-11 13; 1 is the first.
        num_blocks: Instead of blocks: the number of blocks to keep, evenly spaced.
        dtype: Dtype of the weights: float32, bfloat16, float16, or auto for the teacher's dtype.
        allow_download: Allow downloads from the Hugging Face Hub.
        say: Called with a summary.

    Raises:
        ValueError: A block does not exist, the copy fails, or the folder has files.
    """
    if (blocks is None) == (num_blocks is None):
        raise ValueError("give either blocks or num_blocks")
    ranges = [block_range(text) for text in blocks or ()]
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"the folder {str(output)!r} has files: give another --output")
    tokenizer = load_tokenizer(teacher, allow_download)
    model = load_model(teacher, dtype, allow_download)
    total = len(blocks_of(model))
    kept = [i for part in ranges for i in part]
    if num_blocks is not None:
        kept = even_blocks(num_blocks, total)
    student = shallow_copy(model, kept)
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)
    sizes = [sum(x.numel() for x in each.parameters()) for each in (student, model)]
    say(
        f"{output}: blocks {' '.join(map(str, kept))} of {total};"
        f" {sizes[0]:,} of {sizes[1]:,} parameters"
    )


def block_range(text: str) -> range:
    """Parse a text such as ``7`` or ``1-11`` into a range of blocks."""
    first, dash, last = text.partition("-")
    try:
        numbers = int(first), int(last if dash else first)
    except ValueError:
        numbers = (1, 0)
    if numbers[0] > numbers[1]:
        raise ValueError(f"blocks must be blocks or ranges such as 1-11, got {text!r}")
    return range(numbers[0], numbers[1] + 1)


def even_blocks(number: int, total: int) -> list[int]:
    """Return ``number`` evenly spaced blocks, including the first and the last.

    Raises:
        ValueError: ``number`` is not in [1, total].
    """
    if not 1 <= number <= total:
        raise ValueError(f"num_blocks must lie in [1, {total}], got {number}")
    steps = max(1, number - 1)
    return [1 + (2 * i * (total - 1) + steps) // (2 * steps) for i in range(number)]
