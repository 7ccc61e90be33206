"""The parser of every command. Options come from functions, dataclasses and YAML files."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lens_kernels.visible import visible

TYPES = {"str": str, "int": int, "float": float, "Path": Path}
# Maps each option of a YAML file to its values, written as on a command line.
Options = Mapping[str, Sequence[str] | None]
METAVARS: dict[Any, str] = {int: "N", float: "X"}
YES, NO = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


def boolean(text: str | bool) -> bool:
    """Convert a text such as ``yes`` or ``no`` to a bool."""
    if str(text).lower() not in YES + NO:
        raise argparse.ArgumentTypeError(f"must be yes or no, got {text!r}")
    return str(text).lower() in YES


SWITCH: dict[str, Any] = {"nargs": "?", "const": True, "type": boolean}
# Words that look like an option, so that argparse does not take them for values of options.
OPTION = re.compile(r"--[A-Za-z][\w-]*(=.*)?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser whose options are spelt with underscores or dashes, and whose errors are one line.

    Args:
        args: Positional arguments of a base class.
        sections: Titles of the help's further sections, each with the names of its options.
        hidden: Names of options that the help does not show.
        presets: The options of each ``--preset``.
        options: Keyword arguments of ``argparse.ArgumentParser``.
    """

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Collection[str]] | None = None,
        hidden: Collection[str] = (),
        presets: Mapping[str, Options] | None = None,
        **options: Any,
    ) -> None:
        self.known: dict[str, argparse.Action] = {}
        self.presets = presets or {}
        self._sections = sections or {}
        self._hidden = hidden
        self._groups: dict[str, Any] = {}
        options |= {"formatter_class": _Help, "allow_abbrev": False}
        super().__init__(*args, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an option. A switch ``--name`` also gets a negative form, ``--no_name``."""
        names = tuple(x for x in names if x not in self.known and "-" not in x.strip("-"))
        if not names:  # the switch has a negative form already
            return self.known[f"--no_{options['dest']}"]
        name = options.get("dest") or names[0].lstrip("-")
        if name in self._hidden:
            options["help"] = argparse.SUPPRESS
        # Create the groups of options here and not in __init__, because base classes add options
        # inside it.
        self._groups = self._groups or {x: self.add_argument_group(x) for x in self._sections}
        groups = [self._groups[x] for x, names_in in self._sections.items() if name in names_in]
        add = groups[0].add_argument if groups else super().add_argument
        action: argparse.Action = add(*names, **options)
        self.known |= dict.fromkeys(names, action)
        if action.nargs == "?" and action.const is True:
            more = {"dest": action.dest, "default": action.default, "help": argparse.SUPPRESS}
            self.add_argument(f"--no_{action.dest}", action="store_false", **more)
        return action

    def add_function(self, function: Callable[..., Any]) -> None:
        """Add ``--config``, and an option for each argument of ``function``.

        Help texts come from the docstring. Arguments without a default are required. Booleans are
        switches. Sequences take several values. Callables are left out.
        """
        texts = argument_texts(function)
        for name, parameter in inspect.signature(function).parameters.items():
            annotation = str(parameter.annotation)
            if annotation.startswith("Callable"):
                continue
            options: dict[str, Any] = {"help": texts[name].replace("%", "%%")}
            if annotation == "bool":
                options |= SWITCH
            else:
                sequence = re.search(r"(?:Sequence|list)\[(\w+)\]", annotation)
                word = sequence[1] if sequence else annotation.split(" | ")[0]
                options |= {"type": TYPES[word], "nargs": "+" if sequence else None}
            if parameter.default is parameter.empty:
                options["required"] = True
            else:
                options["default"] = parameter.default
            self.add_argument(f"--{name}", **options)
        if self.known.keys() - {"-h", "--help"}:
            self.add_config()

    def add_config(self) -> None:
        """Add the option ``--config``, which names a YAML file of options."""
        text = "YAML file of options; the command line overrides it."
        self.add_argument("--config", metavar="FILE", help=text)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line. Its options override those of ``--config`` and ``--preset``."""
        given = early(self.prog, args)
        words = [*map(underscored, args)]
        for word in words:
            name = word.partition("=")[0]
            if OPTION.fullmatch(word):
                self._check_known(name, f"{name} is not an option")
        for key in given.file:
            self._check_known(f"--{key}", f"{given.config}: {key!r} is not an option")
        preset = self.presets.get(given.preset, {})
        return super().parse_args([*_words(preset), *_words(given.file), *words], namespace)

    def _check_known(self, name: str, message: str) -> None:
        if name not in self.known:
            close = difflib.get_close_matches(name, self.known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"{message}{hint}")

    def error(self, message: str) -> NoReturn:
        """Exit with status 2, after a message of one line."""
        text = f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help"
        self.exit(2, f"{visible(text)}\n")

    def format_help(self) -> str:
        """Return the help. Its first line, the usage, shows only required options."""
        needed = [_form(x) for x in dict.fromkeys(self.known.values()) if x.required]
        self.usage = self.usage or " ".join([self.prog, *needed, "[options]"])
        return super().format_help()


class _Help(argparse.HelpFormatter):
    """A formatter that shows an option once, in one spelling, with its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        return _form(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        hidden = default is None or default is False or default in ("", argparse.SUPPRESS)
        if hidden or not action.option_strings:
            return action.help
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        text = "yes" if default is True else str(getattr(default, "value", default))
        return f"{action.help} Default: {text.replace('%', '%%')}."


def _form(action: argparse.Action) -> str:
    name = action.option_strings[-1]
    if action.nargs == 0:
        return name
    if action.nargs == "?" and action.const is True:
        return f"{name}, --no_{action.dest}" if action.default is True else name
    value = METAVARS.get(action.type, action.dest.rpartition("_")[2].upper())
    if action.choices:
        value = f"{{{','.join(map(str, action.choices))}}}"
    return f"{name} {action.metavar or value}" + " ..." * (action.nargs == "+")


def early(prog: str, words: Sequence[str]) -> argparse.Namespace:
    """Parse the options that decide which other options exist and which libraries are loaded.

    Other options are ignored here. The attribute ``file`` of the result holds the options that were
    read from the ``--config`` file.
    """
    parser = Parser(prog=prog, add_help=False)
    for name in ("--config", "--preset"):
        parser.add_argument(name)
    for name in ("--allow_download", "--help_all"):
        parser.add_argument(name, **SWITCH, default=False)
    words = [*map(underscored, words)]
    path = parser.parse_known_args(words)[0].config
    file: Options = {}
    if path is not None:
        from lens_kernels.option_files import read_options

        try:
            file = read_options(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"--config {path}: {error}")
    given = parser.parse_known_args([*_words(file), *words])[0]
    given.config, given.file = path, file
    return given


def _words(options: Options) -> list[str]:
    given = {name: values for name, values in options.items() if values is not None}
    return [word for name, values in given.items() for word in (f"--{name}", *values)]


def underscored(word: str) -> str:
    """Return an option with underscores in place of dashes. Other words stay as they are."""
    if not OPTION.fullmatch(word):
        return word
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """Return the description of each argument in the ``Args`` section of a docstring."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n(.*?)(?:^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    entries = re.split(r"^    (?=\w+: )", section[1] if section else "", flags=re.MULTILINE)
    pairs = (entry.split(": ", 1) for entry in entries if ": " in entry)
    return {name: re.sub(r"\s+", " ", rest).replace("``", "").strip() for name, rest in pairs}
