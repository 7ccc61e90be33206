"""The key of a teacher cache. It identifies everything on which the cache's content depends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lens_kernels.inputs import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 4
STATES = "states"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHUNK = 1 << 24
FIELDS = ("input_ids", "labels")
# Columns of examples that are part of the digest if the data has them.
OPTIONAL_FIELDS = ("attention_mask", "position_ids")
# Config entries about a model's origin. They do not change the model's outputs.
ORIGINS = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")

# The columns of an example by name: lists or tensors of numbers, and its number.
Example = Mapping[str, Any]


class Indexed(Protocol):
    """Examples by position, such as a list or a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


def counted_positions(labels: Tensor | Sequence[int]) -> Tensor:
    """Return an example's positions at which the next token has a label other than -100."""
    labels = torch.as_tensor(labels)
    if labels.dim() != 1:
        raise ValueError(
            "labels must be one-dimensional, the labels of one example,"
            f" got shape {tuple(labels.shape)}: pass one row at a time"
        )
    return (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]


@dataclass(frozen=True)
class CacheKey:
    """Identifies the sources of a cache. ``CacheKey.of`` makes the key of a model and its data.

    Attributes:
        model: Digest of the teacher's config and weights.
        data: Digest of the tokens and labels of all examples, in order.
        layers: The blocks whose outputs are stored, in ascending order.
        tokenizer: Digest of the tokenizer, or None if none was given.
        dtype: Name of the dtype on disk.
        precision: accelerate's name of the mixed precision that the teacher runs in.
        kind: What the cache holds: ``"states"``, or the kind of its sparse targets.
        format: Version of the files' layout.

    Raises:
        TypeError: The dtype is not one of float32, bfloat16 and float16.
        ValueError: A weight of the model is on the meta device.
    """

    model: str
    data: str
    layers: tuple[int, ...]
    tokenizer: str | None
    dtype: str
    precision: str = "no"
    kind: str = STATES
    format: int = FORMAT

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | None,
        examples: Indexed,
        layers: Iterable[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str = "bfloat16",
        precision: str = "no",
        kind: str = STATES,
    ) -> CacheKey:
        """Return the key for the hidden states of ``model`` after the blocks ``layers``.

        The model reads ``examples``, which ``tokenizer`` made. A cache always has the final normed
        hidden states too. ``dtype`` is the dtype on disk. ``precision`` is accelerate's name for
        the mixed precision that the teacher runs in. A ``kind`` other than ``"states"`` describes
        sparse targets. For these, ``model`` may be None.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        return cls(
            model="" if model is None else digest(_model_parts(model)),
            data=data_digest(examples),
            layers=tuple(sorted(set(layers))),
            tokenizer=None if tokenizer is None else digest([_tokenizer_part(tokenizer)]),
            dtype=name,
            precision=precision,
            kind=kind,
        )

    @property
    def names(self) -> list[str]:
        """Names of the stored hidden states, ``layer_<depth>`` and ``final``; or ``targets``."""
        if self.kind != STATES:
            return ["targets"]
        return [*(f"layer_{depth}" for depth in self.layers), "final"]


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the digest of the concatenated parts."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` shows it."""
    state = hashlib.sha256()
    for chunk in chunks_of(path):
        state.update(chunk)
    return state.hexdigest()


def chunks_of(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in chunks, to save memory."""
    with path.open("rb") as file:
        yield from iter(lambda: file.read(CHUNK), b"")


def json_bytes(value: object) -> bytes:
    """Return a value as JSON with sorted keys, so that equal values give equal bytes."""
    return json.dumps(
        value, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x)
    ).encode()


def data_digest(examples: Indexed) -> str:
    """Return a digest of all examples, in their order."""
    return digest(_data_parts(examples))


def _data_parts(examples: Indexed) -> Iterator[bytes]:
    for i in range(len(examples)):
        example = examples[i]
        for field in (*FIELDS, *(f for f in OPTIONAL_FIELDS if f in example)):
            values = torch.as_tensor(example[field], dtype=torch.int64)
            yield f"{field} {len(values)};".encode()
            yield values.numpy().tobytes()


def _model_parts(model: PreTrainedModel) -> Iterator[bytes | memoryview]:
    yield json_bytes([_computing(model.config), _adapters(model)])
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"model must hold its weights, but {name} is on the meta device: load it first"
            )
        yield json_bytes([name, str(tensor.dtype), list(tensor.shape)])
        # Copy weights from a GPU in pieces, because a whole weight may not fit into main memory.
        for piece in tensor.detach().reshape(-1).view(torch.uint8).split(CHUNK):
            yield piece.cpu().numpy().data


def _adapters(model: PreTrainedModel) -> list[object] | None:
    """Return the configs of a peft model's adapters, and the names of active or merged ones."""
    if not hasattr(model, "peft_config"):
        return None
    from peft import get_model_status

    status = get_model_status(model)
    configs = {name: _computing(config) for name, config in model.peft_config.items()}
    return [configs, status.enabled, status.active_adapters, status.merged_adapters]


def _computing(config: Any) -> dict[str, object]:
    return {k: v for k, v in config.to_dict().items() if k not in ORIGINS}


def _tokenizer_part(tokenizer: PreTrainedTokenizerBase) -> bytes:
    if tokenizer.is_fast:
        inner = json.loads(tokenizer.backend_tokenizer.to_str())
        # Leave out truncation and padding, because calling a tokenizer changes both entries.
        inner |= {"truncation": None, "padding": None}
    else:
        inner = tokenizer.get_vocab()
    return json_bytes([inner, tokenizer.special_tokens_map])
