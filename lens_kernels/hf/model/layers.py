"""Depths that are read through a lens: the even rule of the paper, and the check of given ones."""

from __future__ import annotations


def uniform_layers(num_pairs: int, num_layers: int) -> list[int]:
    """Return ``num_pairs`` depths spread evenly: ``round(i * num_layers / (num_pairs + 1))``.

    Depth ``i`` is the output of block ``i``, counted from 1, as in Hugging Face's
    ``hidden_states``. The rule gives the lists of the DistillLens paper for GPT-2 and Qwen2.5.
    """
    if not 1 <= num_pairs < num_layers:
        raise ValueError(
            f"num_pairs must lie in [1, {num_layers - 1}] for {num_layers} blocks, got {num_pairs}"
        )
    return [round(i * num_layers / (num_pairs + 1)) for i in range(1, num_pairs + 1)]


def check_layers(name: str, layers: list[int], num_layers: int) -> list[int]:
    """Return ``layers`` if every one is the output of a block before the last."""
    for i in layers:
        if not 1 <= i < num_layers:
            raise ValueError(
                f"{name} must lie in [1, {num_layers - 1}], got {i}: 1 is the first block's output,"
                " and the last block's is the final term already"
            )
    return layers
