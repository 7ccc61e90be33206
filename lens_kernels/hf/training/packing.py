"""Packs several examples into each row of a batch, up to ``max_length`` tokens per row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lens_kernels import compat
from lens_kernels.hf.cache.key import Example, Indexed
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.families import causal_lm_of, class_name, input_embeddings
from lens_kernels.hf.model.state import measured
from lens_kernels.hf.model.tracing import sample_tokens
from lens_kernels.hf.training.checks import model_columns
from lens_kernels.hf.training.collation import Collator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The number of rows that are filled at the same time. With a single row, an eighth of each row
# would stay empty.
OPEN_ROWS = 64

T = TypeVar("T")


def packed_rows(sized: Iterable[tuple[T, int]], max_length: int) -> Iterator[list[T]]:
    """Group ``(item, size)`` pairs. Yield lists of items of at most ``max_length`` in total.

    Each list is a row. An item goes into the fullest unfinished row that has space for it. A full
    row is yielded. If ``OPEN_ROWS`` rows are unfinished and none has space, the fullest row is
    yielded.

    Raises:
        ValueError: An item is larger than ``max_length``.
    """
    rooms: list[int] = []
    rows: list[list[T]] = []
    for item, size in sized:
        if size > max_length:
            raise ValueError(
                f"an example has {size} tokens, but packed rows have max_length={max_length}:"
                " truncate the examples, or increase max_length"
            )
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            row = min(fitting, key=rooms.__getitem__)
        else:
            if len(rows) == OPEN_ROWS:
                fullest = min(range(len(rows)), key=rooms.__getitem__)
                rooms.pop(fullest)
                yield rows.pop(fullest)
            row = len(rows)
            rows.append([])
            rooms.append(max_length)
        rows[row].append(item)
        rooms[row] -= size
        if not rooms[row]:
            rooms.pop(row)
            yield rows.pop(row)
    yield from rows


class Packed(Dataset[list[Example]]):
    """A dataset of packed rows. Each is a list of examples with at most ``max_length`` tokens."""

    def __init__(self, dataset: Indexed, max_length: int) -> None:
        self.dataset = dataset
        sized = ((i, packable_size(dataset[i])) for i in range(len(dataset)))
        self.rows = list(packed_rows(sized, max_length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Example]:
        return [model_columns(self.dataset[i]) for i in self.rows[index]]


def packable_size(example: Example) -> int:
    """Return the number of tokens of an example.

    Raises:
        ValueError: The example has masked tokens or ``position_ids``, which packing would replace.
    """
    if "position_ids" in example:
        raise ValueError("packing=True sets position_ids: remove this column from the data")
    mask = example.get("attention_mask")
    if mask is not None and not torch.as_tensor(mask).all():
        raise ValueError(
            "packing=True attends to all tokens, but an attention_mask holds 0: remove the masked"
            " tokens from the data"
        )
    return len(example["input_ids"])


def needs_one_row(model: PreTrainedModel) -> bool:
    """Return whether the model's attention separates examples only if the batch has one row."""
    return any("flash" in name for name in compat.attention_of(model))


def check_packing(name: str, model: PreTrainedModel, collator: Collator) -> None:
    """Check that ``model`` computes the same hidden states for packed and for single examples.

    The model runs on two packed rows of a few tokens. Error messages call the model ``name``.

    Raises:
        ValueError: The model does not take positions, or the examples affect each other.
    """
    embedding = input_embeddings(model)
    tokens = sample_tokens(causal_lm_of(model))[0]
    ids = [tokens[:3], tokens[3:], tokens[2:4], tokens[1:]]
    examples = [{"input_ids": x, "labels": x} for x in ids]
    batch = {x: y.to(embedding.device) for x, y in collator([examples[:2], examples[2:]]).items()}
    del batch["labels"]

    def error() -> float:
        def final(inputs: Mapping[str, Tensor]) -> Tensor:
            return hidden_states(model, [], inputs)[1].double()

        alone = torch.cat([final({"input_ids": x[None]})[0] for x in ids])
        states, own = final(batch).flatten(0, 1), batch["position_ids"].flatten()
        # Leave out padding tokens, whose position is 0 with no position 1 behind it.
        kept = (own > 0) | (own.roll(-1) == 1)
        return ((states[kept] - alone).norm(dim=-1) / alone.norm(dim=-1)).max().item()

    try:
        found = measured(model, error)
    except TypeError as problem:
        raise ValueError(
            f"packing=True needs positions that restart, but the {name}, a {class_name(model)},"
            f" does not take position_ids ({problem}): leave packing out"
        ) from problem
    eps = torch.finfo(embedding.dtype).eps
    if not found <= (1e-4 if eps < 1e-6 else eps**0.5):
        raise ValueError(
            f"packing=True needs a model that separates the examples of a row, but the {name}, a"
            f" {class_name(model)}, mixes them: hidden states differ by {found:.0e} of their size."
            " Leave packing out, or load the model with another attn_implementation"
        )
