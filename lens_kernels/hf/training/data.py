"""Read instruction data from JSON lines, check it, tokenise it and batch it."""

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
FORMATS = ("instruction and output", "prompt and completion", "messages")  # keys of a line
SHOWN = 10  # maximum number of bad lines in one error message

Example = dict[str, list[int]]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """A line of data. Only one of ``instruction``, ``prompt`` and ``messages`` is set.

    Training uses the first of ``references``. A conversation has one: its last assistant turn.
    """

    line: int
    references: list[str]
    instruction: str = ""
    input: str = ""
    prompt: str = ""
    messages: Messages = field(default_factory=list)


def read_rows(path: str | Path) -> list[Row]:
    """Read JSON lines. All lines must have the same format; other keys are ignored.

    The formats are: ``instruction``, ``input`` (optional) and ``output``; ``prompt`` and
    ``completion``; ``messages``, each with ``role`` and ``content``. ``output`` and ``completion``
    may be lists of strings, which are alternative references.

    Raises:
        ValueError: The file has invalid lines (the message lists up to ten), or it is empty.
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
                        f"{found!r} in a file of {file_format!r}: expected one format per file"
                    )
                rows.append(_row(number, record, found))
            except ValueError as error:
                bad.append(f"{path}:{number}: {error}")
    if bad:
        more = f"\nand {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError("invalid lines:\n" + "\n".join(bad[:SHOWN]) + more)
    if not rows:
        raise ValueError(f"{path} is empty: expected one JSON object per line")
    return rows


def _record(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno} ({error.msg})"
        raise ValueError(f"not JSON at {place}: expected one object per line") from error


def _format(record: Any) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"got a {type(record).__name__}: expected a JSON object")
    found = [keys for keys in FORMATS if record.keys() >= set(keys.split(" and "))]
    if len(found) != 1:
        expected = ", or ".join(FORMATS)
        raise ValueError(f"keys {sorted(record)}: expected {expected}, and only one of them")
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
            raise ValueError(f"{name} is invalid: expected an object with role and content")
        role = message["role"]
        if role not in ROLES:
            raise ValueError(f"{name}.role is {role!r}: expected one of {', '.join(ROLES)}")
        content = _text(f"{name}.content", message["content"], may_be_blank=role != "assistant")
        messages.append({"role": role, "content": content})
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("messages has no assistant turn: expected at least one to train on")
    if messages[0]["role"] == "assistant":
        raise ValueError("messages starts with an assistant turn: expected a prompt before it")
    return messages


def _text(name: str, value: Any, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}: expected a string")
    if not may_be_blank and not value.strip():
        raise ValueError(f"{name} is empty: expected text")
    if value.encode(errors="ignore").decode() != value:
        raise ValueError(f"{name} contains half a surrogate pair: expected valid Unicode")
    return value


def encode(
    row: Row, tokenizer: Any, *, prompt_style: str, max_length: int, max_prompt_length: int
) -> Example | None:
    """Return ``input_ids`` and ``labels`` of a row, or None if the row is too long.

    Prompts and responses are tokenised separately, so no token spans both, as in generation.
    Labels are the response tokens, including the end token, and -100 elsewhere. The end token
    is the end of turn that the chat template writes, or the tokenizer's EOS if it writes none.
    A row is too long if its first prompt is, or if ``max_length`` leaves no label.

    Args:
        row: A row of ``read_rows``.
        tokenizer: A tokenizer with an EOS token.
        prompt_style: How an instruction becomes a prompt. ``"alpaca"`` inserts it into the
            Stanford Alpaca text. ``"chat"`` renders it as a user message with the tokenizer's chat
            template. Both styles leave ``prompt`` unchanged and render ``messages`` with the
            template. Every assistant turn is trained on.
        max_length: Maximum number of tokens; longer examples are truncated.
        max_prompt_length: Maximum number of tokens before the first response.

    Raises:
        ValueError: A value is out of range, the tokenizer has no EOS, or its chat template is
            missing or rejects the messages.
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
    """Return the tokens that ``encode`` puts before the last response, or None if too many."""
    _check_prompt(prompt_style, max_prompt_length)
    *earlier, (prompt, _) = _turns(row, tokenizer, prompt_style)
    ids = [i for turn in earlier for part in turn for i in part] + prompt
    return ids if len(ids) <= max_prompt_length else None


def _turns(row: Row, tokenizer: Any, prompt_style: str) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of each prompt and of its response."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to end responses: set tokenizer.eos_token")
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
    # verbose=False silences a warning about long texts: they are truncated or dropped later.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _begin(tokenizer: Any, ids: list[int]) -> list[int]:
    """Prepend BOS to ``ids`` if the tokenizer adds BOS to a sample text."""
    bos, letter = tokenizer.bos_token_id, _ids(tokenizer, "a")
    writes = bos is not None and tokenizer("a")["input_ids"][: 1 + len(letter)] == [bos, *letter]
    return [bos, *ids] if writes and ids[:1] != [bos] else ids


def _end(tokenizer: Any, response: str, *ends: str) -> list[int]:
    """Return the tokens of a response, plus EOS unless the text ends in one of ``ends``."""
    return _ids(tokenizer, response) + [tokenizer.eos_token_id] * (not response.endswith(ends))


def _chat_turns(row: Row, messages: Messages, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Split the rendered conversation where assistant turns begin and end.

    Whitespace that the template writes after a turn belongs to the next prompt.
    """
    # End-of-turn tokens are often special tokens without an attribute on the tokenizer.
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
                f"line {row.line}: the tokenizer's chat template changes the text before"
                f" messages[{i}] when later messages are added: use a tokenizer whose template only"
                " appends, or end the conversation after its first assistant turn"
            )
        response = whole[len(prompt) :].rstrip()
        opening = _ids(tokenizer, prompt[len(done) :])
        turns.append((opening, _end(tokenizer, response, tokenizer.eos_token, *ends)))
        done = prompt + response
    return turns


def _render(row: Row, messages: Messages, tokenizer: Any, add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"line {row.line}: the tokenizer has no chat template: use another tokenizer"
            + (
                ", or rows with prompt and completion"
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
            f"line {row.line}: the tokenizer's chat template rejects the messages ({error}):"
            " correct them, or use another tokenizer"
        ) from error


def _check_prompt(prompt_style: str, max_prompt_length: int) -> None:
    if prompt_style not in PROMPT_STYLES:
        raise ValueError(
            f"prompt_style must be one of {', '.join(PROMPT_STYLES)}, got {prompt_style!r}"
        )
    check_count("max_prompt_length", max_prompt_length, 1)


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless the option ``name`` is an integer and at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


class Examples(Dataset[dict[str, Any]]):
    """Encoded rows; ``example_id`` is the position. ``dropped`` is the number of omitted rows."""

    def __init__(self, examples: Sequence[Example], dropped: int) -> None:
        self.examples = examples
        self.dropped = dropped

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = range(len(self))[index]  # maps negative indices to positions
        return {**self.examples[position], "example_id": position}

    def summary(self) -> str:
        """Return one line that describes the size of the data."""
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
    """Read and encode a file (see ``read_rows`` and ``encode``); drop rows that are too long.

    Raises:
        ValueError: ``read_rows`` or ``encode`` raises it, or every row is too long.
    """
    rows = read_rows(path)
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    bar = tqdm(rows, "Encoding", disable=not progress, delay=1)  # no bar for short files
    encoded = [encode(row, tokenizer, prompt_style=prompt_style, **limits) for row in bar]
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise ValueError(
            f"all {len(rows)} rows of {path} are too long for max_prompt_length"
            f" {max_prompt_length} and max_length {max_length}: increase them"
        )
    return Examples(examples, dropped=len(rows) - len(examples))


def padding_id(tokenizer: Any) -> int:
    """Return the tokenizer's padding id, or else its EOS id: padding is masked, so any id works."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither pad_token nor eos_token: set tokenizer.pad_token")


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right; the attention mask depends on lengths, not on the padding id."""

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
