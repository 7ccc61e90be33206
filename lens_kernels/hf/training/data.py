"""Instruction data: JSON lines read and checked, encoded as prompts and responses, batched."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from lens_kernels.inputs import IGNORE_INDEX

PROMPT_STYLES = ("alpaca", "chat")
ROLES = ("system", "user", "assistant")
FORMATS = ("instruction and output", "prompt and completion", "messages")  # the keys of a line
SHOWN = 10  # bad lines that one error spells out

Example = dict[str, list[int]]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """A line of data; of ``instruction``, ``prompt`` and ``messages`` one is filled.

    Training learns the first of ``references``; messages have one, their last assistant turn.
    """

    line: int
    references: list[str]
    instruction: str = ""
    input: str = ""
    prompt: str = ""
    messages: Messages = field(default_factory=list)


def read_rows(path: str | Path) -> list[Row]:
    """Read JSON lines, all of one format, other keys ignored.

    The formats: ``instruction``, ``input`` (optional) and ``output``; ``prompt`` and
    ``completion``; ``messages``, each with ``role`` and ``content``. ``output`` and ``completion``
    may be lists of strings: several references.

    Raises:
        ValueError: Lines that cannot be used, as many as ten in one message, or no lines.
    """
    rows: list[Row] = []
    bad: list[str] = []
    file_format = ""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                record = _record(raw)
                found = _format(record)
                file_format = file_format or found
                if found != file_format:
                    raise ValueError(
                        f"{found} in a file of {file_format}: expected one format a file"
                    )
                rows.append(_row(number, record, found))
            except ValueError as error:
                bad.append(f"{path}:{number}: {error}")
    if bad:
        more = f"\nand {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError("lines that cannot be used:\n" + "\n".join(bad[:SHOWN]) + more)
    if not rows:
        raise ValueError(f"{path} is empty: expected one JSON object a line")
    return rows


def _record(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno} ({error.msg})"
        raise ValueError(f"not JSON at {place}: expected one object a line") from error


def _format(record: Any) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}: expected a JSON object")
    found = [keys for keys in FORMATS if record.keys() >= set(keys.split(" and "))]
    if len(found) != 1:
        expected = ", or ".join(FORMATS)
        raise ValueError(f"keys {sorted(record)}: expected {expected}, and only one of these")
    return found[0]


def _row(line: int, record: Any, found: str) -> Row:
    if found == "messages":
        messages = _messages(record["messages"])
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        return Row(line, answers[-1:], messages=messages)
    question, answer = found.split(" and ")
    text = _text(question, record[question])
    outputs = record[answer]
    if outputs == []:
        raise ValueError(f"{answer} is an empty list: expected at least one string")
    if isinstance(outputs, list):
        references = [_text(f"{answer}[{i}]", x) for i, x in enumerate(outputs)]
    else:
        references = [_text(answer, outputs)]
    if question == "prompt":
        return Row(line, references, prompt=text)
    context = _text("input", record.get("input", ""), may_be_blank=True)
    return Row(line, references, instruction=text, input=context)


def _messages(value: Any) -> Messages:
    if not isinstance(value, list):
        raise ValueError(f"messages is a {type(value).__name__}: expected a list of messages")
    messages = []
    for i, message in enumerate(value):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise ValueError(f"{name} is not an object with role and content")
        role = message["role"]
        if role not in ROLES:
            raise ValueError(f"{name}.role is {role!r}: expected one of {', '.join(ROLES)}")
        content = _text(f"{name}.content", message["content"], may_be_blank=role != "assistant")
        messages.append({"role": role, "content": content})
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("messages hold no assistant turn: expected at least one, to learn from")
    if messages[0]["role"] == "assistant":
        raise ValueError("messages begin with an assistant turn: expected a prompt in front of it")
    return messages


def _text(name: str, value: Any, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}: expected a string")
    if not may_be_blank and not value.strip():
        raise ValueError(f"{name} is empty: expected text")
    if value.encode(errors="ignore").decode() != value:
        raise ValueError(f"{name} holds half a surrogate pair: expected whole characters")
    return value


def encode(
    row: Row, tokenizer: Any, *, prompt_style: str, max_length: int, max_prompt_length: int
) -> Example | None:
    """Return ``input_ids`` and ``labels`` of a row, or None where it is too long to learn from.

    Prompts and responses are tokenised apart, so that no token straddles their border, as none does
    in generation. Labels are the tokens of responses with the token that ends them, and -100
    elsewhere. That token is the end of turn written by the chat template; where none is written
    it is the tokenizer's EOS.

    Args:
        row: A row of ``read_rows``.
        tokenizer: A tokenizer with an EOS token.
        prompt_style: What becomes of instructions: ``"alpaca"`` puts them into the text that
            Stanford Alpaca uses, ``"chat"`` into a user's message for the tokenizer's chat
            template. In either style prompts with completions are taken as they are, and messages
            go through the template, to be learnt at each assistant turn.
        max_length: Tokens after which the example is cut.
        max_prompt_length: Tokens that may stand before the first response.

    Raises:
        ValueError: A value out of range, or a tokenizer without EOS or a chat template that serves.
    """
    _check_prompt(prompt_style, max_prompt_length)
    check_count("max_length", max_length, 2)
    turns = _turns(row, tokenizer, prompt_style)
    if len(turns[0][0]) > max_prompt_length:
        return None
    example: Example = {"input_ids": [], "labels": []}
    for prompt, response in turns:
        example["input_ids"] += prompt + response
        example["labels"] += [IGNORE_INDEX] * len(prompt) + response
    example = {name: ids[:max_length] for name, ids in example.items()}
    return example if set(example["labels"]) - {IGNORE_INDEX} else None


def prompt_ids(
    row: Row, tokenizer: Any, *, prompt_style: str, max_prompt_length: int
) -> list[int] | None:
    """Return the tokens before the last response, as ``encode`` has them, or None if too many."""
    _check_prompt(prompt_style, max_prompt_length)
    *earlier, (prompt, _) = _turns(row, tokenizer, prompt_style)
    ids = [i for turn in earlier for part in turn for i in part] + prompt
    return ids if len(ids) <= max_prompt_length else None


def _turns(row: Row, tokenizer: Any, prompt_style: str) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of each prompt and of the response to it."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, which ends responses: set tokenizer.eos_token"
        )
    if row.messages:
        return _chat_turns(row, row.messages, tokenizer)
    response = row.references[0]
    if row.instruction and prompt_style == "chat":
        question = f"{row.instruction}\n\n{row.input}" if row.input.strip() else row.instruction
        asked = {"role": "user", "content": question}
        answered = {"role": "assistant", "content": response}
        return _chat_turns(row, [asked, answered], tokenizer)
    prompt = _ids(tokenizer, _alpaca(row) if row.instruction else row.prompt)
    return [(_begin(tokenizer, prompt), _end(tokenizer, response, tokenizer.eos_token))]


def _alpaca(row: Row) -> str:
    further, section = "", ""
    if row.input.strip():
        further = ", paired with an input that provides further context"
        section = f"### Input:\n{row.input}\n\n"
    return (
        f"Below is an instruction that describes a task{further}. Write a response that"
        " appropriately completes the request.\n\n"
        f"### Instruction:\n{row.instruction}\n\n{section}### Response:\n"
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    # Not verbose: longer texts than the model's are expected here, and cut or dropped.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _begin(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return ``ids`` behind a BOS token if the tokenizer writes one, which only a trial tells."""
    bos, letter = tokenizer.bos_token_id, _ids(tokenizer, "a")
    writes = bos is not None and tokenizer("a")["input_ids"][: 1 + len(letter)] == [bos, *letter]
    return [bos, *ids] if writes and ids[:1] != [bos] else ids


def _end(tokenizer: Any, response: str, *ends: str) -> list[int]:
    """Return the tokens of a response that EOS closes, unless it ends in one of ``ends``."""
    return _ids(tokenizer, response) + [tokenizer.eos_token_id] * (not response.endswith(ends))


def _chat_turns(row: Row, messages: Messages, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Cut the rendered conversation where assistant turns begin and end.

    A turn ends before the whitespace that the template puts behind it: that opens the next prompt.
    """
    # Ends of turns are often special tokens that the tokenizer has no name for.
    ends = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    turns = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(row, messages[:i], tokenizer, add_generation_prompt=True)
        whole = _render(row, messages[: i + 1], tokenizer, add_generation_prompt=False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise ValueError(
                f"line {row.line}: the tokenizer's chat template writes the text before"
                f" messages[{i}] differently once the conversation goes on, so its turns have no"
                " fixed place: give a tokenizer whose template only appends, or cut the"
                " conversation after its first assistant turn"
            )
        response = whole[len(prompt) :].rstrip()
        opening = _ids(tokenizer, prompt[len(done) :])
        turns.append((opening, _end(tokenizer, response, tokenizer.eos_token, *ends)))
        done = prompt + response
    return turns


def _render(row: Row, messages: Messages, tokenizer: Any, add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"line {row.line}: the tokenizer has no chat template: give another tokenizer"
            + (
                ", or rows of prompt and completion"
                if row.messages
                else ', or prompt_style="alpaca"'
            )
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except TemplateError as error:
        raise ValueError(
            f"line {row.line}: the tokenizer's chat template refuses the messages ({error}):"
            " mend them, or give another tokenizer"
        ) from error


def _check_prompt(prompt_style: str, max_prompt_length: int) -> None:
    if prompt_style not in PROMPT_STYLES:
        raise ValueError(
            f"prompt_style must be one of {', '.join(PROMPT_STYLES)}, got {prompt_style!r}"
        )
    check_count("max_prompt_length", max_prompt_length, 1)


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless the option ``name`` is an integer of ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


class Examples(Dataset[dict[str, Any]]):
    """Encoded rows, each with its position as ``example_id``; ``dropped`` counts those too long."""

    def __init__(self, examples: Sequence[Example], dropped: int) -> None:
        self.examples = examples
        self.dropped = dropped

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = range(len(self))[index]  # also of an index that counts from the end
        return {**self.examples[position], "example_id": position}

    def summary(self) -> str:
        """Return a line about the size of the data."""
        labels = [x for example in self.examples for x in example["labels"]]
        learnt = len(labels) - labels.count(IGNORE_INDEX)
        return (
            f"{len(self) + self.dropped} rows, {self.dropped} dropped as too long;"
            f" {len(labels)} tokens, {learnt} of them labelled"
        )


def load_examples(
    path: str | Path,
    tokenizer: Any,
    *,
    prompt_style: str = "alpaca",
    max_length: int = 512,
    max_prompt_length: int = 256,
    progress: bool = True,
) -> Examples:
    """Read and encode a file (see ``read_rows`` and ``encode``), leaving out rows too long.

    Raises:
        ValueError: What ``read_rows`` and ``encode`` refuse, or no row is short enough.
    """
    rows = read_rows(path)
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    bar = tqdm(rows, "Encoding", disable=not progress, delay=1)  # none where it is quick
    encoded = [encode(row, tokenizer, prompt_style=prompt_style, **limits) for row in bar]
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise ValueError(
            f"all {len(rows)} rows of {path} are too long for max_prompt_length"
            f" {max_prompt_length} and max_length {max_length}: raise them"
        )
    return Examples(examples, dropped=len(rows) - len(examples))


def padding_id(tokenizer: Any) -> int:
    """Return the tokenizer's padding token, or its EOS: padding is masked, whatever it is."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither pad_token nor eos_token: set tokenizer.pad_token")


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right; the attention mask goes by length, so any id may pad."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_count("pad_token_id", self.pad_token_id, 0)
        if self.pad_to_multiple_of is not None:
            check_count("pad_to_multiple_of", self.pad_to_multiple_of, 1)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``labels``, ``attention_mask``, and ``example_id`` if given."""
        ids = [torch.as_tensor(x["input_ids"]) for x in examples]
        labels = [torch.as_tensor(x["labels"]) for x in examples]
        batch = {
            "input_ids": self._padded(ids, self.pad_token_id),
            "labels": self._padded(labels, IGNORE_INDEX),
            "attention_mask": self._padded([torch.ones_like(x) for x in ids], 0),
        }
        if "example_id" in examples[0]:
            batch["example_id"] = torch.tensor([x["example_id"] for x in examples])
        return batch

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        batch = pad_sequence(rows, batch_first=True, padding_value=value)
        return pad(batch, (0, -batch.shape[1] % (self.pad_to_multiple_of or 1)), value=value)
