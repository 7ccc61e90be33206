"""Command-line options that are generated from a function's signature and docstring."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

import pytest

from lens_kernels.signature import add_options, argument_texts


def sample(
    text: str,
    path: Path,
    either: str | Path,
    *,
    count: int = 3,
    share: float = 0.5,
    place: str | Path | None = None,
    numbers: Sequence[int] = (1, 2),
    parts: list[float] | None = None,
    wide_name: bool = True,
    off: bool = False,
    hidden: object = None,
) -> None:
    """Do nothing.

    A line like this: is not an argument.

    Args:
        text: The first, with ``code``, a 50% sign and: a colon.
        path: A folder
            over

            lines: one looks like an entry.
        either: Both.
        count: A number.
        share: A part.
        place: Somewhere.
        numbers: Several.
        parts: Some.
        wide_name: A switch.
        off: Another.

    Raises:
        ValueError: Never.
    """


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_options(parser, sample, skip=("hidden",))
    return parser


def test_texts_come_from_the_docstring():
    texts = argument_texts(sample)
    assert list(texts) == [name for name in signature(sample).parameters if name != "hidden"]
    assert texts["text"] == "The first, with code, a 50% sign and: a colon."
    assert texts["path"] == "A folder over lines: one looks like an entry."
    assert texts["off"] == "Another."
    assert argument_texts(lambda: None) == {}


REQUIRED = ["--text", "t", "--path", "p", "--either", "e"]


def test_options_have_the_kind_and_default_of_the_argument(parser):
    few = vars(parser.parse_args(REQUIRED))
    assert few.keys() == signature(sample).parameters.keys() - {"hidden"}
    for name, parameter in signature(sample).parameters.items():
        if name not in ("text", "path", "either", "hidden"):
            assert few[name] == parameter.default
    assert (few["text"], few["path"], few["either"]) == ("t", Path("p"), "e")
    argv = "--count 7 --share 1 --place x --numbers 5 --parts 1 .5 --no-wide-name --off"
    many = vars(parser.parse_args([*REQUIRED, *argv.split()]))
    expected = {"count": 7, "share": 1.0, "place": "x", "numbers": [5]}
    expected |= {"parts": [1.0, 0.5], "wide_name": False, "off": True}
    assert {name: many[name] for name in expected} == expected
    assert [type(x) for x in (many["share"], many["parts"][0])] == [float, float]


def test_arguments_without_a_default_are_required(parser, capsys):
    for at in (0, 2, 4):
        with pytest.raises(SystemExit):
            parser.parse_args(REQUIRED[:at] + REQUIRED[at + 2 :])
        assert f"required: {REQUIRED[at]}\n" in capsys.readouterr().err


def test_help_has_texts_and_defaults(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = re.sub(r"\s+", " ", parser.format_help())
    for expected in (
        "--text TEXT The first, with code, a 50% sign and: a colon. --path",
        "--count COUNT A number. Default: 3. --share SHARE A part. Default: 0.5. --place",
        "--numbers NUMBERS [NUMBERS ...] Several. Default: 1 2. --parts",
        "--wide-name, --no-wide-name A switch. Default: --wide-name. --off",
        "--off, --no-off Another. Default: --no-off.",
    ):
        assert expected in shown
