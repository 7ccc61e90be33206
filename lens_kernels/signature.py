"""Command-line options generated from a function's signature and docstring."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

TYPES = {"str": str, "int": int, "float": float, "Path": Path}


def add_options(
    parser: argparse.ArgumentParser, function: Callable[..., Any], skip: tuple[str, ...] = ()
) -> None:
    """Add an option for each argument of ``function``, with its help text from the docstring.

    Arguments without a default are required. Booleans become ``--name`` and ``--no-name``.
    Sequences take several values.
    """
    texts = argument_texts(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skip:
            continue
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        option = name.replace("_", "-")
        options: dict[str, Any] = {"default": default}
        annotation = str(parameter.annotation)
        if annotation == "bool":
            options["action"] = argparse.BooleanOptionalAction
            shown = f"--{option}" if default else f"--no-{option}"
        else:
            sequence = re.search(r"(?:Sequence|list)\[(\w+)\]", annotation)
            word = sequence[1] if sequence else annotation.split(" | ")[0]
            options |= {"type": TYPES[word], "nargs": "+" if sequence else None}
            options["required"] = required
            shown = _text(default)
        text = texts[name] if default is None else f"{texts[name]} Default: {shown}."
        # The help is set afterwards, because some Python versions would append the default of a
        # boolean option to it.
        parser.add_argument(f"--{option}", **options).help = text.replace("%", "%%")


def argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """Return the description of each argument from the ``Args`` section of a docstring."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n(.*?)(?:^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    entries = re.split(r"^    (?=\w+: )", section[1] if section else "", flags=re.MULTILINE)
    pairs = (entry.split(": ", 1) for entry in entries if ": " in entry)
    return {name: re.sub(r"\s+", " ", rest).replace("``", "").strip() for name, rest in pairs}


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
