"""Checks the records of instruction data, and converts them from several formats to ``Row``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lens_kernels.hf.training.files import read_records

ROLES = ("system", "developer", "user", "assistant", "tool")
# Maps names of speakers in ShareGPT data to roles of messages.
SPEAKERS = {"human": "user", "gpt": "assistant", "function_call": "assistant"}
SPEAKERS |= {"observation": "tool", "system": "system", "user": "user", "assistant": "assistant"}
# Keys of messages that chat templates may read, besides role and content.
FOR_TEMPLATES = ("name", "tool_calls", "tool_call_id", "reasoning_content")
# The data formats. Each is named after the keys that its records must have.
FORMATS = ("instruction and output", "prompt and completion", "messages", "conversations")
# The key of plain text. Records that also have the keys of another format are not plain text.
TEXT = "text"
# The maximum number of bad lines that an error message lists.
SHOWN = 10

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A record of data. At most one of ``instruction``, ``prompt`` and ``messages`` is set.

    If none of them is set, the row is plain text, and ``references`` holds the text. Training uses
    the first entry of ``references``. For a conversation, ``references`` is the last assistant
    turn, but training uses all assistant turns from the message ``trained_from`` on. ``line`` is
    the record's line or position in its file.
    """

    line: int
    references: list[str]
    instruction: str = ""
    input: str = ""
    prompt: str = ""
    messages: Messages = field(default_factory=list)
    trained_from: int = 0

    @property
    def is_text(self) -> bool:
        """Return whether the row is plain text, without a prompt."""
        return not (self.instruction or self.prompt or self.messages)


def read_rows(source: str | Path) -> list[Row]:
    """Read all records of a source (see ``read_records``). All must have the same format.

    The formats are:

    - ``instruction``, ``input`` (optional) and ``output``;
    - ``prompt`` and ``completion``, both strings, or both lists of messages;
    - ``messages``: a list of messages, each with ``role`` and ``content``;
    - ``conversations``: a list of turns, each with ``from`` and ``value``, as in ShareGPT;
    - ``text``: plain text.

    ``output`` and ``completion`` may be lists of strings, which are alternative references. Other
    keys are ignored.

    Raises:
        ValueError: Records are invalid (the message lists up to ten), or there are none.
    """
    return rows_of(source, read_records(source))


def rows_of(source: str | Path, records: Iterable[tuple[str, int, object]]) -> list[Row]:
    """Convert the results ``(file, number, record)`` of ``read_records`` to rows."""
    rows: list[Row] = []
    bad: list[str] = []
    for row in _rows(records):
        if isinstance(row, Row):
            rows.append(row)
        else:
            bad.append(str(row))
    if bad:
        more = f"\nand {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError("invalid lines:\n" + "\n".join(bad[:SHOWN]) + more)
    if not rows:
        raise ValueError(f"{source} is empty: expected one JSON object per line")
    return rows


def iterate_rows(source: str | Path) -> Iterator[Row]:
    """Yield the rows of a source one by one, without reading all of them first.

    Raises:
        ValueError: A record is invalid.
    """
    for row in _rows(read_records(source, streaming=True)):
        if isinstance(row, ValueError):
            raise row
        yield row


def _rows(records: Iterable[tuple[str, int, object]]) -> Iterator[Row | ValueError]:
    """Yield the row of each record, or for a bad record an error with its file and number."""
    first_format = ""
    for file, number, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"got a {type(record).__name__}: expected a JSON object")
            found = _format(record)
            first_format = first_format or found
            if found != first_format:
                raise ValueError(
                    f"the keys {found!r} in a file with the keys {first_format!r}: expected one"
                    " format per file"
                )
            yield _row(number, record, found)
        except ValueError as error:
            yield ValueError(f"{file}:{number}: {error}")


def is_raw(record: object) -> bool:
    """Return whether a record has a format of ``read_rows``, and is not tokenised yet."""
    try:
        return isinstance(record, dict) and "input_ids" not in record and bool(_format(record))
    except ValueError:
        return False


def _format(record: Mapping[str, object]) -> str:
    # In tables, every row has every column, and empty cells are None.
    keys = {key for key, value in record.items() if value is not None}
    found = [names for names in FORMATS if keys >= set(names.split(" and "))]
    if not found and TEXT in keys:
        return TEXT
    if len(found) != 1:
        expected = ", or ".join([*FORMATS, TEXT])
        raise ValueError(f"got the keys {sorted(record)}: expected only one of: {expected}")
    return found[0]


def _row(line: int, record: Mapping[str, object], found: str) -> Row:
    if found == TEXT:
        return Row(line, [_text(TEXT, record[TEXT])])
    if found == "conversations":
        return _conversation(line, _messages(found, _from_sharegpt(record[found])))
    if found == "messages":
        return _conversation(line, _messages(found, record[found]))
    if found == "prompt and completion" and _is_conversation(record["prompt"]):
        before = _messages("prompt", record["prompt"], trained=False)
        after = _messages("completion", record["completion"], first=False)
        return _conversation(line, before + after, trained_from=len(before))
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
    context = _text("input", record.get("input") or "", may_be_blank=True)
    return Row(line, references, instruction=text, input=context)


def _conversation(line: int, messages: Messages, trained_from: int = 0) -> Row:
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    return Row(line, answers[-1:], messages=messages, trained_from=trained_from)


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _from_sharegpt(value: object) -> Messages:
    """Convert ShareGPT's turns to messages, which ``_messages`` checks afterwards."""
    if not isinstance(value, list):
        raise ValueError(f"conversations is a {type(value).__name__}: expected a list of turns")
    messages = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or not turn.keys() >= {"from", "value"}:
            raise ValueError(
                f"conversations[{i}] is invalid: expected an object with from and value"
            )
        speaker = turn["from"]
        if speaker not in SPEAKERS:
            raise ValueError(
                f"conversations[{i}].from is {speaker!r}: expected one of {', '.join(SPEAKERS)}"
            )
        messages.append({"role": SPEAKERS[speaker], "content": turn["value"]})
    return messages


def _messages(key: str, value: object, trained: bool = True, first: bool = True) -> Messages:
    """Check a list of messages, and return it. Errors name the ``key``.

    With ``trained``, the list must have an assistant turn. With ``first``, the list begins a
    conversation, so its first message must not be the assistant's.
    """
    if not isinstance(value, list):
        raise ValueError(f"{key} is a {type(value).__name__}: expected a list of messages")
    messages = []
    for i, message in enumerate(value):
        name = f"{key}[{i}]"
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise ValueError(f"{name} is invalid: expected an object with role and content")
        role, calls = message["role"], message.get("tool_calls")
        if role not in ROLES:
            raise ValueError(f"{name}.role is {role!r}: expected one of {', '.join(ROLES)}")
        content = message["content"]
        if content is None and calls:
            content = ""
        text = _text(f"{name}.content", content, may_be_blank=role != "assistant" or bool(calls))
        further = {k: message[k] for k in FOR_TEMPLATES if message.get(k) is not None}
        messages.append({"role": role, "content": text, **further})
    if trained and not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"{key} has no assistant turn: expected at least one to train on")
    if first and messages and messages[0]["role"] == "assistant":
        raise ValueError(f"{key} starts with an assistant turn: expected a prompt before it")
    return messages


def _text(name: str, value: object, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}: expected a string")
    if not may_be_blank and not value.strip():
        raise ValueError(f"{name} is empty: expected text")
    if value.encode(errors="ignore").decode() != value:
        raise ValueError(f"{name} contains half a surrogate pair: expected valid Unicode")
    return value
