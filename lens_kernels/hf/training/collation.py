"""Checks tokenised examples, and pads them into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lens_kernels.hf.cache.key import Example
from lens_kernels.inputs import IGNORE_INDEX
from lens_kernels.targets import SparseTargets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from lens_kernels.hf.cache.targets import TargetCache


def check_count(name: str, value: object, least: int) -> None:
    """Raise unless the option ``name`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's padding id, or its EOS id if it has no padding id.

    The id does not matter, because padding tokens are masked.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither pad_token nor eos_token: set tokenizer.pad_token")


# Columns with one number per token, and the number at padding tokens. Padding tokens are masked, so
# their positions and token types may be any valid numbers.
PER_TOKEN = {"labels": IGNORE_INDEX, "attention_mask": 0, "position_ids": 0, "token_type_ids": 0}


Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right, or packs them into rows.

    A missing ``attention_mask`` is made from the lengths of the examples.

    A list of examples becomes one packed row. Packed batches have ``position_ids`` that restart at
    each example, and no ``attention_mask``. Models separate examples where positions restart. Each
    padding token has position 0, so it is separate too. With ``one_row``, a packed batch is a
    single row without padding, because flash attention separates examples only if the batch is one
    row.

    Raises:
        ValueError: Examples have different columns, the columns of an example differ in length, or
            a column is unknown.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    one_row: bool = False

    def __post_init__(self) -> None:
        check_count("pad_token_id", self.pad_token_id, 0)
        if self.pad_to_multiple_of is not None:
            check_count("pad_to_multiple_of", self.pad_to_multiple_of, 1)

    @staticmethod
    def columns() -> set[str]:
        """Return the names of the columns that can be batched."""
        return {"input_ids", "example_id", *PER_TOKEN}

    def __call__(self, examples: Sequence[Example | Sequence[Example]]) -> Batch:
        """Return a batch of ``input_ids``, ``labels``, ``attention_mask`` and other given columns.

        Packed batches have ``position_ids`` instead of ``attention_mask``, and the ``example_id``
        of each row's examples, padded with -1.
        """
        packed = isinstance(examples[0], list)
        groups = [list(x) if isinstance(x, Sequence) else [x] for x in examples]
        if packed and self.one_row:
            groups = [[x for group in groups for x in group]]
        number = count()
        rows = [
            [columns_of(f"example {next(number)} of a batch", x) for x in group] for group in groups
        ]
        for i, part in enumerate(part for row in rows for part in row):
            if part.keys() != rows[0][0].keys():
                raise ValueError(
                    f"example {i} of a batch has the columns {sorted(part)}, but example 0 has"
                    f" {sorted(rows[0][0])}: give all examples the same columns"
                )
        joined = [_joined(row) if packed else row[0] for row in rows]
        batch = {"input_ids": self._padded([row["input_ids"] for row in joined], self.pad_token_id)}
        for name, value in PER_TOKEN.items():
            if name in joined[0]:
                batch[name] = self._padded([row[name] for row in joined], value)
        if "example_id" in joined[0]:
            ids = [row["example_id"].reshape(-1) for row in joined]
            batch["example_id"] = pad_sequence(ids, True, -1) if packed else torch.cat(ids)
        return batch

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        batch = pad_sequence(rows, batch_first=True, padding_value=value)
        return pad(batch, (0, -batch.shape[1] % (self.pad_to_multiple_of or 1)), value=value)


def _joined(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return examples joined into one row. Each example's first label is -100, so no loss uses it.

    The examples' own ``attention_mask`` and ``position_ids`` are replaced.
    """
    for x in examples:
        del x["attention_mask"]
        x["position_ids"] = torch.arange(len(x["input_ids"]))
        x["labels"] = x["labels"].clone()
        x["labels"][:1] = IGNORE_INDEX
    return {name: torch.cat([x[name].reshape(-1) for x in examples]) for name in examples[0]}


def tokens_in(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the number of tokens of a batch, without padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    if "position_ids" not in batch:
        return torch.tensor(batch["input_ids"].numel())
    # In a packed batch, an example begins at each position 0 that position 1 follows. Any other
    # position 0 is padding. So examples of one token are not counted.
    positions = batch["position_ids"]
    return (positions > 0).sum() + (positions == 1).sum()


def columns_of(where: str, example: Example) -> dict[str, Tensor]:
    """Return the columns of an example as tensors, with an ``attention_mask``."""
    known = Collator.columns()
    if missing := sorted({"input_ids", "labels"} - example.keys()):
        raise ValueError(
            f"{where} has no {missing[0]}, only {', '.join(sorted(example))}:"
            " tokenise the data (see load_examples)"
        )
    if unknown := sorted(example.keys() - known):
        raise ValueError(
            f"{where} has the column {unknown[0]!r}: expected some of"
            f" {', '.join(sorted(known))}; remove the column, or pass a data_collator"
        )
    columns = {name: torch.as_tensor(x) for name, x in example.items()}
    ids = columns["input_ids"]
    columns.setdefault("attention_mask", torch.ones_like(ids))
    for name, values in columns.items():
        if name != "example_id" and (values.dim() != 1 or values.shape != ids.shape):
            raise ValueError(
                f"{name} of {where} has shape {tuple(values.shape)}, but input_ids has"
                f" {tuple(ids.shape)}: give one number per token, in one dimension"
            )
    return columns


def example_numbers(example_ids: Tensor) -> list[int]:
    """Return the ``example_id`` of all examples in a batch, which may be packed."""
    if example_ids.dim() > 1:
        example_ids = example_ids[example_ids >= 0]
    numbers: list[int] = example_ids.tolist()
    return numbers


def targets_of(
    cache: TargetCache, example_ids: Tensor | None, tokens: int, device: torch.device
) -> SparseTargets:
    """Return the stored targets of a batch in which ``tokens`` positions count."""
    if example_ids is None:
        raise ValueError("teacher_targets needs example_id in the batch: add it to the dataset")
    targets = cache.targets(example_numbers(example_ids))
    if len(targets.token_ids) != tokens:
        raise ValueError(
            f"the targets have {len(targets.token_ids)} positions for this batch, expected"
            f" {tokens}: example_id must hold the positions of the batch's examples in the dataset"
        )
    ids, probabilities = (x.to(device) for x in (targets.token_ids, targets.probabilities))
    return SparseTargets(ids, probabilities, targets.rest)


def check_batch(batch: Mapping[str, Tensor]) -> None:
    """Check that a batch has ``input_ids`` and ``labels`` of equal shape.

    Raises:
        ValueError: ``input_ids`` or ``labels`` is missing, or their shapes differ.
    """
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise ValueError(
                f"the batch has no {name}, only {', '.join(sorted(batch))}: give data with"
                " input_ids and labels, or a data_collator that adds them"
            )
    shapes = [tuple(batch[name].shape) for name in ("labels", "input_ids")]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"labels have shape {shapes[0]}, but input_ids have {shapes[1]}: give one label per"
            f" token, and {IGNORE_INDEX} for tokens that are not trained on, without a shift"
        )


def rows_of_last_step(dataset: object, args: TrainingArguments, batch: int) -> int:
    """Return the rows of all processes in an epoch's last step, or 0 if that step is full.

    ``batch`` is the batch size of training.
    """
    if args.dataloader_drop_last or not hasattr(dataset, "__len__"):
        return 0
    # With split_batches, the processes share one batch.
    accelerator: Any = args.accelerator_config  # TrainingArguments converts it
    batches = 1 if accelerator.split_batches else args.world_size
    return int(len(dataset) % (batch * batches))


def first_rows(batch: Mapping[str, Tensor], rows: int) -> Batch:
    """Return a copy of the batch in which only the first ``rows`` rows have labels."""
    labels = batch["labels"].clone()
    labels[rows:] = IGNORE_INDEX
    kept = {**batch, "labels": labels}
    # the cache must return nothing for rows without labels
    if "example_id" in batch:
        kept["example_id"] = batch["example_id"][:rows]
    return kept


def without_first_label(batch: Batch) -> Batch:
    """Return a copy of the batch in which each row's first label is -100: no loss uses it."""
    if "labels" not in batch:
        return batch
    labels = batch["labels"].clone()
    labels[..., :1] = IGNORE_INDEX
    return {**batch, "labels": labels}
