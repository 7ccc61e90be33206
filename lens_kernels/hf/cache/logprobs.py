"""Read the top log-probabilities that an inference server returned, from a file.

The format is JSON Lines or Parquet with a record for each position::

    {"example": 0, "position": 7, "ids": [11, 42], "logprobs": [-0.1, -2.5]}

``example`` counts the examples of the data, and ``position`` the tokens of an example, both from 0.
The log-probabilities, in descending order, are for the token after ``position``.

``from_vllm`` converts a file of answers from vLLM's server, with one line per example in the order
of the data. The requests must set ``prompt_logprobs``, with the token ids of the whole example as
the prompt. An answer holds the prompt's own tokens, so an answer to another prompt is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_kernels.hf.cache.key import Example, Indexed, counted_positions
from lens_kernels.targets import TOLERANCE

FORMATS = ("records", "vllm")
# Servers round log-probabilities. So one may be slightly above 0, and the sum of the probabilities
# slightly above 1.
ROUNDING, SUM = 1e-4, 1.0 + TOLERANCE
LARGEST_ID = torch.iinfo(torch.int32).max

# Maps an example's number and a position to token ids and their log-probabilities.
Found = dict[tuple[int, int], tuple[list[int], list[float]]]


def read(path: Path, form: str = "records") -> Found:
    """Return the token ids and log-probabilities in a file, by example and position.

    Raises:
        ValueError: A record is malformed. The message names its line.
    """
    found: Found = {}
    for number, (line, record) in enumerate(_records(path)):
        where = f"{path}, line {line}"
        if not isinstance(record, Mapping):
            raise ValueError(f"{where}: expected an object, got a {type(record).__name__}")
        parts = from_vllm(record, number, where) if form == "vllm" else [record]
        for part in parts:
            key, value = _checked(part, where)
            if key in found:
                raise ValueError(f"{where}: example {key[0]} has position {key[1]} twice")
            found[key] = value
    return found


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        path.stat()  # raises a clear FileNotFoundError if the file is missing
        try:
            table = parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
        yield from enumerate(table, 1)
        return
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {line}: is not JSON: {error}") from None


def from_vllm(answer: Mapping[str, object], example: int, where: str) -> list[dict[str, Any]]:
    """Convert one answer of vLLM to records, one for each position.

    Entry ``i`` of the answer predicts token ``i``, so it becomes the record of position ``i - 1``.
    Besides the most probable tokens, a record has the prompt's own token, which vLLM adds.
    """
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else answer
    entries = choice.get("prompt_logprobs") if isinstance(choice, Mapping) else None
    if not isinstance(entries, list):
        raise ValueError(f"{where}: has no prompt_logprobs: set them in the request to the server")
    records = []
    for i, entry in enumerate(entries):
        if entry is None:  # no entry predicts the first token
            continue
        try:
            pairs = [(int(key), float(value["logprob"])) for key, value in entry.items()]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"{where}: prompt_logprobs[{i}] must map token ids to objects with 'logprob'"
            ) from None
        pairs.sort(key=lambda pair: -pair[1])
        ids, logprobs = [x for x, _ in pairs], [x for _, x in pairs]
        records.append({"example": example, "position": i - 1, "ids": ids, "logprobs": logprobs})
    return records


def _checked(
    record: Mapping[str, Any], where: str
) -> tuple[tuple[int, int], tuple[list[int], list[float]]]:
    for name in ("example", "position", "ids", "logprobs"):
        if name not in record:
            raise ValueError(f"{where}: has no {name!r}, only {sorted(record)}")
    key = record["example"], record["position"]
    ids, logprobs = record["ids"], record["logprobs"]
    if not all(type(x) is int and x >= 0 for x in key):
        raise ValueError(f"{where}: example and position must be integers from 0 on, got {key}")
    if not isinstance(ids, list) or not all(type(x) is int and 0 <= x <= LARGEST_ID for x in ids):
        raise ValueError(f"{where}: ids must be a list of token ids")
    if not isinstance(logprobs, list) or len(logprobs) != len(ids) or not ids:
        raise ValueError(f"{where}: logprobs must be a list as long as ids, and not empty")
    for value in logprobs:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise ValueError(f"{where}: logprobs must be numbers, got {value!r}")
        if value > ROUNDING:
            raise ValueError(f"{where}: the log-probability {value} is above 0")
    if any(a < b for a, b in zip(logprobs, logprobs[1:], strict=False)):
        raise ValueError(f"{where}: logprobs are not in descending order: sort them with their ids")
    if len({*ids}) != len(ids):
        raise ValueError(f"{where}: ids holds a token twice")
    total = math.fsum(math.exp(min(0.0, x)) for x in logprobs)
    if not 0.0 < total <= SUM:
        raise ValueError(
            f"{where}: the probabilities of logprobs must have a sum in (0, 1], got {total:g}"
        )
    return key, (ids, [float(x) for x in logprobs])


def check_examples(found: Found, data: Indexed, path: Path, form: str) -> None:
    """Raise an error if log-probabilities are those of other examples than ``data``.

    Raises:
        ValueError: A record's example is not in the data, or an answer of vLLM has another prompt.
    """
    last = max((example for example, _ in found), default=0)
    if last >= len(data):
        raise ValueError(
            f"{path} has a record of example {last}, but the data has {len(data)} examples, counted"
            " from 0 without those that are dropped: use log-probabilities of the same examples"
        )
    if form != "vllm":
        return
    tokens = [data[i]["input_ids"] for i in range(last + 1)]
    for (example, position), (ids, _) in found.items():
        own = tokens[example]
        if position + 1 < len(own) and int(own[position + 1]) not in ids:
            raise ValueError(
                f"{path}: the answer for example {example} has another prompt than the tokens of"
                f" the example: its prompt_logprobs[{position + 1}] lacks the example's token. Send"
                " the ids of the whole example as the prompt"
            )


def targets_of(found: Found, example: int, data: Example, path: Path) -> dict[str, Tensor]:
    """Return the sparse targets of an example as tensors that ``TargetCache`` stores.

    Raises:
        ValueError: The file ``path`` has no record of a position that the loss counts.
    """
    sizes, ids, weights = [], [], []
    for position in counted_positions(data["labels"]).tolist():
        if (example, position) not in found:
            raise ValueError(
                f"{path} has no record of example {example}, position {position}: the loss counts"
                " this position, so the file must have its log-probabilities"
            )
        tokens, logprobs = found[example, position]
        sizes.append(len(tokens))
        ids += tokens
        weights += [math.exp(min(0.0, x)) for x in logprobs]
    return {
        "sizes": torch.tensor(sizes, dtype=torch.int32),
        "ids": torch.tensor(ids, dtype=torch.int32),
        "weights": torch.tensor(weights, dtype=torch.float32),
    }
