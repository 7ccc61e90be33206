"""The parser of every command: options from functions and files, spellings, errors and help."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path

import pytest

from lens_kernels.arguments import Parser, argument_texts


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
    say: Callable[[str], None] = print,
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
    parser = Parser(prog="sample")
    parser.add_function(sample)
    return parser


def test_texts_come_from_the_docstring():
    texts = argument_texts(sample)
    assert list(texts) == [name for name in signature(sample).parameters if name != "say"]
    assert texts["text"] == "The first, with code, a 50% sign and: a colon."
    assert texts["path"] == "A folder over lines: one looks like an entry."
    assert texts["off"] == "Another."
    assert argument_texts(lambda: None) == {}


REQUIRED = ["--text", "t", "--path", "p", "--either", "e"]


def test_options_have_the_kind_and_default_of_the_argument(parser):
    few = vars(parser.parse_args(REQUIRED))
    assert few.keys() == signature(sample).parameters.keys() - {"say"} | {"config"}
    for name, parameter in signature(sample).parameters.items():
        if name not in ("text", "path", "either", "say"):
            assert few[name] == parameter.default
    assert (few["text"], few["path"], few["either"]) == ("t", Path("p"), "e")
    argv = "--count 7 --share 1 --place x --numbers 5 --parts 1 .5 --no-wide-name --off"
    many = vars(parser.parse_args([*REQUIRED, *argv.split()]))
    expected = {"count": 7, "share": 1.0, "place": "x", "numbers": [5]}
    expected |= {"parts": [1.0, 0.5], "wide_name": False, "off": True}
    assert {name: many[name] for name in expected} == expected
    assert [type(x) for x in (many["share"], many["parts"][0])] == [float, float]


def refused(parser, words, capsys):
    """Return the parser's error message without the program's name and the last hint."""
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("sample: ") and shown.endswith("; see sample --help\n")
    assert shown.count("\n") == 1
    return shown[len("sample: ") : -len("; see sample --help\n")]


def test_arguments_without_a_default_are_required(parser, capsys):
    for at in (0, 2, 4):
        shown = refused(parser, REQUIRED[:at] + REQUIRED[at + 2 :], capsys)
        assert shown.endswith(f"required: {REQUIRED[at]}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wide-nam"], "--wide_nam is not an option; did you mean --wide_name?"),
        (["--txt=a"], "--txt is not an option; did you mean --text?"),
        (["--zzz"], "--zzz is not an option"),
        (["--tex", "a"], "--tex is not an option; did you mean --text?"),
        ([*REQUIRED, "more\x1b[2J"], "unrecognized arguments: more\\u001b[2J"),
        ([*REQUIRED, "--off", "maybe"], "argument --off: must be yes or no, got 'maybe'"),
    ],
)
def test_words_that_are_no_options_are_refused_in_one_line(parser, capsys, words, message):
    assert refused(parser, words, capsys) == message


def test_dashes_and_underscores_are_one_spelling(parser):
    for words in (
        ["--wide-name", "no"],
        ["--wide_name=no"],
        ["--no-wide-name"],
        ["--no_wide_name"],
    ):
        assert parser.parse_args([*REQUIRED, *words]).wide_name is False
    kept = parser.parse_args([*REQUIRED[2:], "--text=--a-b", "--place", "--a-b c"])
    assert (kept.text, kept.place) == ("--a-b", "--a-b c")


def test_a_file_gives_options_that_the_words_override(parser, capsys, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        "text: t\npath: p\neither: e\ncount: 7\nnumbers: [5, 6]\nwide_name: false\nplace:\n"
    )
    given = parser.parse_args(["--config", str(file), "--count", "8"])
    assert (given.text, given.count, given.numbers, given.wide_name) == ("t", 8, [5, 6], False)
    assert given.place is None
    file.write_text("cuont:\n")
    message = f"{file}: 'cuont' is not an option; did you mean --count?"
    assert refused(parser, ["--config", str(file)], capsys) == message
    assert "No such file" in refused(parser, ["--config", "none.yaml"], capsys)


def test_help_has_texts_and_defaults(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = re.sub(r"\s+", " ", parser.format_help())
    for expected in (
        "usage: sample --text TEXT --path PATH --either EITHER [options] ",
        "--text TEXT The first, with code, a 50% sign and: a colon. --path",
        "--count N A number. Default: 3. --share X A part. Default: 0.5. --place",
        "--numbers N ... Several. Default: 1 2. --parts X ... Some. --wide_name",
        "--wide_name, --no_wide_name A switch. Default: yes. --off Another. --config",
    ):
        assert expected in shown
