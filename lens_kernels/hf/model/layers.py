"""The layers of lens pairs: the paper's even spacing, and a check of layers that users pass."""

from __future__ import annotations


def uniform_layers(num_pairs: int, num_layers: int) -> list[int]:
    """Return ``num_pairs`` evenly spaced depths: ``round(i * num_layers / (num_pairs + 1))``.

    Depth ``i`` is the output of block ``i``, counted from 1, as in Hugging Face's
    ``hidden_states``. The result equals the lists of the DistillLens paper for GPT-2 and Qwen2.5.
    """
    if not 1 <= num_pairs < num_layers:
        raise ValueError(
            f"num_pairs must lie in [1, {num_layers - 1}] for {num_layers} blocks, got {num_pairs}"
        )
    return [round(i * num_layers / (num_pairs + 1)) for i in range(1, num_pairs + 1)]


def check_layers(name: str, layers: list[int], num_layers: int) -> list[int]:
    """Return ``layers`` if each is the output of a block before the last, else raise."""
    for i in layers:
        if not 1 <= i < num_layers:
            raise ValueError(
                f"{name} must lie in [1, {num_layers - 1}], got {i}: 1 is the first block's output,"
                " and the final loss term already compares the last block's output"
            )
    return layers
