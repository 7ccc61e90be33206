"""Prepares a trainer's datasets: tokenises, checks, numbers and packs their examples."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import AcceleratorConfig

from lens_kernels.hf.training.caching import numbered
from lens_kernels.hf.training.checks import Limits, check_data, check_example, model_columns
from lens_kernels.hf.training.collation import Collator
from lens_kernels.hf.training.config import LensDistillConfig
from lens_kernels.hf.training.data import Encoder, encode_rows
from lens_kernels.hf.training.formats import Row, is_raw, iterate_rows, rows_of
from lens_kernels.hf.training.packing import Packed, check_packing, packable_size, packed_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """Converts a user's dataset to examples that the collator takes.

    ``encoder`` tokenises raw records. If ``number`` is True, examples get an ``example_id``. A
    collator from the user gets the examples unchanged.
    """

    limits: Limits
    collator: object
    encoder: Encoder | None
    number: bool
    progress: bool

    def examples(self, name: str, dataset: Any) -> Any:
        """Return the examples of ``dataset``, which error messages call ``name``.

        Raises:
            ValueError: Records are invalid, all are too long, or ``check_data`` fails.
            TypeError: The examples must be numbered, but the dataset has no indexing.
        """
        if isinstance(dataset, Mapping) and not self.number:
            return {key: self.examples(f"{name}[{key!r}]", part) for key, part in dataset.items()}
        if isinstance(dataset, IterableDataset) and not self.number:
            return Stream(name, dataset, self, repeat=name == "train_dataset")
        if self._is_raw(dataset):
            records = ((name, i, dataset[i]) for i in range(len(dataset)))
            dataset = encode_rows(
                name, rows_of(name, records), self.new_encoder(name), self.progress
            )
            log = _log.warning if dataset.dropped or dataset.cut else _log.info
            log("%s: %s", name, dataset.summary())
        check_data(name, dataset, self.limits, self.collator)
        return numbered(name, dataset) if self.number else dataset

    def _is_raw(self, dataset: Any) -> bool:
        if not isinstance(self.collator, Collator) or isinstance(dataset, Mapping):
            return False
        indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        return indexed and len(dataset) > 0 and is_raw(dataset[0])

    def new_encoder(self, name: str) -> Encoder:
        """Return a copy of the encoder with counts of 0, or raise if there is no tokenizer."""
        if self.encoder is None:
            raise ValueError(
                f"{name} holds records that are not tokenised: pass the tokenizer as"
                " processing_class, or data with input_ids and labels"
            )
        return replace(self.encoder)


class Stream(IterableDataset[object]):
    """A dataset that reads, encodes and checks one example after the other, during training.

    With ``repeat``, the stream starts again at its end. A run that resumes then skips the examples
    of earlier epochs too. If ``max_length`` is set, the examples are packed.
    """

    def __init__(
        self, name: str, dataset: Iterable[object], how: Preparation, repeat: bool
    ) -> None:
        self.name, self.dataset, self.how, self.repeat = name, dataset, how, repeat
        self.max_length: int | None = None
        self.encoder: Encoder | None = None

    def __iter__(self) -> Iterator[object]:
        if self.max_length is None:
            return self._examples()
        sized = ((x, packable_size(x)) for x in self._examples() if isinstance(x, Mapping))
        return packed_rows(sized, self.max_length)

    def summary(self) -> str:
        """Return a text with the numbers of rows that were read, dropped and cut so far."""
        return "no row was encoded" if self.encoder is None else self.encoder.summary()

    def _examples(self) -> Iterator[object]:
        for epoch in count():
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            examples = (self._example(i, x) for i, x in enumerate(self.dataset))
            found = False
            for example in examples:
                if example is not None:
                    found = True
                    yield example
            if not self.repeat:
                return
            if not found:
                raise ValueError(
                    f"{self.name} gives no example in epoch {epoch}: pass data that can be read"
                    " again, with rows that are not too long"
                )

    def _example(self, number: int, record: object) -> object:
        """Encode and check a record. Return its example, or None if the record is dropped."""
        ours = isinstance(self.how.collator, Collator)
        where = f"example {number} of {self.name}"
        row = record
        example: Any = record
        if ours and is_raw(record):
            (row,) = rows_of(self.name, [(self.name, number, record)])
        if ours and isinstance(row, Row):
            self.encoder = self.encoder or self.how.new_encoder(self.name)
            example = self.encoder(row)
        if example is None:
            return None
        if ours or isinstance(example, Mapping):
            check_example(where, example, self.how.limits, ours)
        return model_columns(example) if ours else example


class Rows(IterableDataset[Row]):
    """Yields the rows of files during training, shuffled within a buffer of ``buffer`` rows.

    When the buffer is full, each new row takes the place of a random row, which is yielded.
    """

    def __init__(self, source: str | Path, buffer: int, seed: int) -> None:
        self.source, self.buffer, self.seed, self.epoch = source, buffer, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        chosen, held = random.Random(f"{self.seed} {self.epoch}"), []
        for row in iterate_rows(self.source):
            held.append(row)
            if len(held) > self.buffer:
                i = chosen.randrange(len(held))
                held[i], held[-1] = held[-1], held[i]
                yield held.pop()
        chosen.shuffle(held)
        yield from held


def prepare(
    trainer: dict[str, Any], models: Mapping[str, PreTrainedModel | None], args: LensDistillConfig
) -> dict[str, Any]:
    """Prepare the datasets in a trainer's arguments. Return the datasets before packing.

    Raises:
        ValueError: An option does not suit the data, or ``Preparation.examples`` or
            ``check_packing`` fails.
    """
    collator, tokenizer = trainer["data_collator"], trainer.get("processing_class")
    present = {name: model for name, model in models.items() if model is not None}
    size = args.vocab_size if models["teacher"] is not None else None
    encoder = None if tokenizer is None else Encoder(tokenizer, **args.encoder_options())
    limits = Limits.of(list(present.values()), size)
    number = bool(args.teacher_cache or args.teacher_targets)
    how = Preparation(limits, collator, encoder, number, not args.disable_tqdm)
    names = ("train_dataset", "eval_dataset")
    found = {
        name: None if trainer.get(name) is None else how.examples(name, trainer[name])
        for name in names
    }
    trainer |= {name: x for name, x in found.items() if x is not None}
    train = found["train_dataset"]
    if isinstance(train, IterableDataset):
        if args.max_steps < 1:
            raise ValueError(
                "train_dataset is read during training, without a length: set max_steps"
            )
        _let_each_process_read(args)
    if args.packing and train is not None:
        if not isinstance(collator, Collator):
            raise ValueError(
                "packing=True needs the default data_collator: leave data_collator out"
            )
        for name, model in present.items():
            check_packing(name, model, collator)
        trainer["train_dataset"] = packed(train, args.max_length)
    return found


def _let_each_process_read(args: LensDistillConfig) -> None:
    """Let each process read its own batches, unless the user has chosen otherwise.

    By default, rank 0 would concatenate the batches of all processes. This fails, because the rows
    of different batches differ in length.
    """
    config = args.accelerator_config
    assert isinstance(config, AcceleratorConfig)  # the Trainer's arguments convert it
    if config.dispatch_batches is None:
        config.dispatch_batches = False


def packed(dataset: Any, max_length: int) -> Any:
    """Return a dataset of packed rows: lists of examples with at most ``max_length`` tokens."""
    if isinstance(dataset, Stream):
        dataset.max_length = max_length
        return dataset
    return Packed(dataset, max_length)
