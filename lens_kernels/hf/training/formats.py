"""Read instruction data from a JSON Lines file, and check every line."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant")
# The formats of a line, named by the keys that it must have.
FORMATS = ("instruction and output", "prompt and completion", "messages")
SHOWN = 10  # maximum number of bad lines in one error message

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """A line of data. Only one of ``instruction``, ``prompt`` and ``messages`` is set.

    Training uses the first of ``references``. A conversation has one reference, its last assistant
    turn.
    """

    line: int
    references: list[str]
    instruction: str = ""
    input: str = ""
    prompt: str = ""
    messages: Messages = field(default_factory=list)


def read_rows(path: str | Path) -> list[Row]:
    """Read JSON lines. All lines must have the same format. Other keys are ignored.

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
                        f"the keys {found!r} in a file with the keys {file_format!r}: expected one"
                        " format per file"
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
        return json.loads(raw.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno} ({error.msg})"
        raise ValueError(f"not JSON at {place}: expected one object per line") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice: keep one of them")
    return record


def _format(record: Any) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"got a {type(record).__name__}: expected a JSON object")
    found = [keys for keys in FORMATS if record.keys() >= set(keys.split(" and "))]
    if len(found) != 1:
        expected = ", or ".join(FORMATS)
        raise ValueError(f"got the keys {sorted(record)}: expected only one of: {expected}")
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
