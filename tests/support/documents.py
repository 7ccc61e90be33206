"""The project's metadata, and its Markdown pages with their links, examples and commands."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
]
NOTEBOOKS = sorted((ROOT / "docs").glob("**/*.ipynb"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
DOWNLOAD = "# Needs a download: "


class Block(NamedTuple):
    """A fenced block: its page, its language, its text, and the line where the text begins."""

    page: Path
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Return all fenced blocks in the given languages, from all pages."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCED.finditer(text):
            if match[1] in languages:
                line = text.count("\n", 0, match.start()) + 2
                found.append(Block(page, match[1], match[2], line))
    return found


def prose(page: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    return FENCED.sub("", page.read_text())


def code_spans(page: Path) -> list[str]:
    """Return the code spans in a page's prose. Spans over several lines are joined."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def links(page: Path) -> list[str]:
    """Return the targets of all links and pictures of a page, including pictures inside links."""
    inner = LINK.findall(prose(page))
    return inner + re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub generates for the headings of a page."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", title.lower())
        anchor, number = words.replace(" ", "-"), 0
        while (name := anchor if not number else f"{anchor}-{number}") in found:
            number += 1
        found.add(name)
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield ``(location, words)`` for each command in code blocks and prose of all pages."""
    for block in blocks("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = _own(shlex.split(line, comments=True))
            if words:
                yield f"{block}: {line}", words
    for page in PAGES:
        for span in code_spans(page):
            if span.startswith(("lens-kernels ", "python ", "make ", "pip ")):
                yield f"{page.relative_to(ROOT)}: {span}", _own(shlex.split(span))


def _own(words: list[str]) -> list[str]:
    if "lens_kernels" in words and words[words.index("lens_kernels") - 1] == "-m":
        return ["lens-kernels", *words[words.index("lens_kernels") + 1 :]]
    return words


class Parsed(BaseException):
    """Raised when a command has parsed its arguments, instead of running it. Holds the parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every command raise ``Parsed`` after parsing its arguments."""
    parse_args: Any = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        parse_args(self, *args, **options)
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
