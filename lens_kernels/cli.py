"""The ``lens-kernels`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lens_kernels import cache
from lens_kernels.arguments import Parser, early
from lens_kernels.failures import guarded
from lens_kernels.version import __version__
from lens_kernels.visible import WHITE, visible

# Each command, with its summary and the function whose arguments are the command's options.
COMMANDS = {
    "train": ("distil a teacher into a student", ""),
    "student": (
        "make a student of some blocks of its teacher",
        "hf.model.student_command:make_student",
    ),
    "cache": (
        "store a few tokens of a teacher's output for each position",
        "hf.training.cache_command:make_cache",
    ),
    "tune-lens": (
        "train a tuned lens for layers of a model, on its own output",
        "hf.training.tuned_lens:tune_lens",
    ),
    "eval": (
        "compute cross entropy, and ROUGE-L of generated answers",
        "hf.evaluation.generation:evaluate_model",
    ),
    "inspect": (
        "show the logit-lens predictions of one model or several",
        "hf.inspection.command:inspect_models",
    ),
    "demo": (
        "distil SmolLM2-135M into 20 of its 30 blocks, without network access",
        "hf.training.demo:distil",
    ),
    "env": ("show versions, devices, and the backend that each device uses", "machine:describe"),
    "tune": ("find the fastest tiles of the Triton kernels", "machine:tune"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] not in COMMANDS:
        _parser().parse_args(words)  # prints the help, the version, or an error, and exits
        return 2
    return guarded(words[0], lambda: _run(words[0], words[1:]))


def _parser() -> Parser:
    parser = Parser(
        prog="lens-kernels",
        usage="lens-kernels COMMAND [options]",
        description="Distil language models through the logit lens.",
        epilog="lens-kernels COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"lens-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, _) in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser


def _run(name: str, words: list[str]) -> int:
    prog, target = f"lens-kernels {name}", COMMANDS[name][1]
    if not target.startswith("machine"):
        # transformers reads HF_HUB_OFFLINE at import, so the option for downloads is parsed before
        # that.
        _prepare(early(prog, words).allow_download)
    if name == "train":
        from lens_kernels.hf.training import command

        command.train(*command.parse(words), _say)
        return 0
    module, _, member = target.partition(":")
    function: Callable[..., Any] = getattr(import_module(f"lens_kernels.{module}"), member)
    parser = Parser(prog=prog, description=(function.__doc__ or "").split("\n")[0])
    parser.add_function(function)
    options = vars(parser.parse_args(words))
    options.pop("config", None)
    function(**options, say=_say)
    return 0


def _say(text: str) -> None:
    print(visible(text, keep=WHITE), flush=True)


def _prepare(download: bool) -> None:
    if not download:  # Otherwise libraries would ask the Hub for updates of local files.
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        # torch loads compiled code from a cache folder as pickles, which can run code. The default
        # is a folder under /tmp that another user could create first.
        folder = cache.folder() / "inductor"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError:  # if the folder cannot be created, torch uses its default
            return
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
