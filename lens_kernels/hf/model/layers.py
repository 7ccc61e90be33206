"""The layers of lens pairs: the paper's even spacing, and a check of layers that users choose."""

from __future__ import annotations

DEFAULT_PAIRS = 4


def uniform_layers(num_pairs: int, num_layers: int) -> list[int]:
    """Return ``num_pairs`` evenly spaced depths: ``round(i * num_layers / (num_pairs + 1))``.

    Depth ``i`` is the output of block ``i``, counted from 1, as in Hugging Face's
    ``hidden_states``. ``num_layers`` is the number of blocks. The result equals the lists of the
    DistillLens paper for GPT-2 and Qwen2.5.

    Raises:
        ValueError: ``num_pairs`` is not in ``[1, num_layers - 1]``.
    """
    if not 1 <= num_pairs < num_layers:
        raise ValueError(
            f"num_pairs must lie in [1, {num_layers - 1}] for {num_layers} blocks, got {num_pairs}"
        )
    return [round(i * num_layers / (num_pairs + 1)) for i in range(1, num_pairs + 1)]


def check_layers(name: str, layers: list[int], num_layers: int) -> list[int]:
    """Return ``layers`` if each is a block before the last one. Raise an error otherwise."""
    for i in layers:
        if not 1 <= i < num_layers:
            raise ValueError(
                f"{name} must lie in [1, {num_layers - 1}], got {i}: 1 is the output of the first"
                " block, and the final loss term already compares the output of the last block"
            )
    return layers


def lens_layers(
    student_blocks: int,
    teacher_blocks: int,
    num_lens_pairs: int | None = None,
    student_layers: list[int] | None = None,
    teacher_layers: list[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Return the layers of student and teacher to compare, by default evenly spaced layers.

    The default of ``num_lens_pairs`` is 4, or less if a model has fewer than five blocks.
    """
    check_choice(num_lens_pairs, student_layers, teacher_layers)
    if student_layers is not None and teacher_layers is not None:
        return student_layers, teacher_layers
    most = min(student_blocks, teacher_blocks) - 1
    pairs = min(DEFAULT_PAIRS, most) if num_lens_pairs is None else num_lens_pairs
    if pairs > most:
        raise ValueError(
            f"num_lens_pairs must be at most {most} for a student of {student_blocks} blocks and a"
            f" teacher of {teacher_blocks}, got {pairs}: set a smaller number"
        )
    if pairs == 0:
        return [], []
    return uniform_layers(pairs, student_blocks), uniform_layers(pairs, teacher_blocks)


def check_choice(
    num_lens_pairs: int | None, student_layers: list[int] | None, teacher_layers: list[int] | None
) -> None:
    """Raise an error if one list of layers is missing, or if the number of pairs is negative."""
    if (student_layers is None) != (teacher_layers is None):
        raise ValueError(
            "give student_layers and teacher_layers together, or neither:"
            f" got {student_layers} and {teacher_layers}"
        )
    if num_lens_pairs is not None and num_lens_pairs < 0:
        raise ValueError(f"num_lens_pairs must be at least 0, got {num_lens_pairs}")
