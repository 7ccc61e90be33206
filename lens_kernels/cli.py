"""The ``lens-kernels`` command."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from lens_kernels import cache
from lens_kernels.failures import guarded
from lens_kernels.signature import add_options
from lens_kernels.visible import WHITE, visible

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "liger-kernel", "trl")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    # Parsing these commands' options imports transformers, so do it only for them.
    heavy = {"train": _train, "eval": _eval, "inspect": _inspect, "student": _student}
    if arguments and arguments[0] in heavy:
        return _run_command(arguments[0], heavy[arguments[0]], arguments[1:])
    args = _parser().parse_args(arguments)
    run = {"demo": _demo, "env": _env, "tune": _tune}[args.command]
    return guarded(args.command, lambda: run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lens-kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="distil a teacher into a student")
    commands.add_parser("eval", help="compute cross entropy, and ROUGE-L of generated answers")
    commands.add_parser("inspect", help="draw the logit-lens predictions of two models")
    commands.add_parser("student", help="make a student of some blocks of its teacher")
    demo = commands.add_parser(
        "demo", help="distil SmolLM2-135M into 20 of its 30 blocks, without network access"
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        help="folder for the results; default %(default)s",
    )
    demo.add_argument(
        "--cache",
        type=Path,
        default=None,
        help="folder for the converted teacher; default: the user's cache folder",
    )
    demo.add_argument(
        "--steps", type=_positive, default=40, help="number of optimiser steps; default %(default)s"
    )
    demo.add_argument("--seed", type=int, default=0, help="random seed; default %(default)s")
    commands.add_parser("env", help="show versions, devices, and the backend that each device uses")
    tune = commands.add_parser("tune", help="find the fastest tiles of the Triton kernels")
    tune.add_argument(
        "--student-width", type=_positive, required=True, help="student's hidden size"
    )
    tune.add_argument(
        "--teacher-width", type=_positive, required=True, help="teacher's hidden size"
    )
    tune.add_argument("--vocab", type=_positive, required=True, help="vocabulary size")
    tune.add_argument(
        "--tokens",
        type=_positive,
        default=4096,
        help="unmasked tokens in a batch; default %(default)s",
    )
    tune.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="dtype of hidden states and heads; default %(default)s",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _say(text: str) -> None:
    print(visible(text, keep=WHITE), flush=True)


def _prepare(download: bool) -> None:
    """Set the environment variables that libraries read when they are imported."""
    if not download:  # otherwise the libraries ask the Hub for newer versions of local files
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        # torch loads pickles of compiled code from this folder. By default it is a folder under
        # /tmp, which another user could create first.
        folder = cache.folder() / "inductor"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError:  # the folder cannot be created, so torch's default remains
            return
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _allows_download(argv: list[str]) -> bool:
    """Return whether the options or the ``--config`` file allow downloads.

    This must be known before the full parsers exist, because these import libraries that read the
    setting at import.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--allow-download", "--allow_download", nargs="?", const="true")
    parser.add_argument(
        "--no-allow-download", dest="allow_download", action="store_const", const="false"
    )
    parser.add_argument("--config", nargs="?")
    given = parser.parse_known_args(argv)[0]
    value = given.allow_download
    if value is None and given.config is not None:
        import yaml

        try:
            options = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
            value = options.get("allow_download")
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
            return False  # the command itself will report the error in the file
    return str(value).lower() in ("true", "t", "yes", "y", "1")


def _run_command(name: str, command: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a command that needs transformers."""

    def run() -> int:
        _prepare(_allows_download(argv))
        command(argv)
        return 0

    return guarded(name, run)


def _train(argv: list[str]) -> None:
    from lens_kernels.hf.training import command

    config, args, chosen = command.parse(argv)
    command.train(config, args, chosen, _say)


def _eval(argv: list[str]) -> None:
    from lens_kernels.hf.evaluation.generation import evaluate_model

    summary = (evaluate_model.__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(
        prog="lens-kernels eval", description=summary, allow_abbrev=False
    )
    add_options(parser, evaluate_model, skip=("say",))
    evaluate_model(**vars(parser.parse_args(argv)), say=_say)


def _inspect(argv: list[str]) -> None:
    from lens_kernels.hf.inspection.inspect import inspect
    from lens_kernels.hf.model.loading import check_tokenizers, load_model, load_tokenizer

    parser = argparse.ArgumentParser(
        prog="lens-kernels inspect",
        description="Show what the logit lens predicts at every depth of two models, on one text.",
        allow_abbrev=False,
    )
    parser.add_argument("--student", required=True, help="folder or Hub name of the student")
    parser.add_argument(
        "--teacher",
        required=True,
        help="folder or Hub name of the teacher; it must have the same tokenizer",
    )
    parser.add_argument(
        "--layers",
        type=_pair,
        nargs="+",
        metavar="S:T",
        help="the pairs of student and teacher layers used in training, such as 5:8 10:16",
    )
    parser.add_argument(
        "--allow-download", action="store_true", help="allow downloading models from the Hub"
    )
    add_options(parser, inspect, skip=("student", "teacher", "tokenizer", "pairs"))
    options: dict[str, Any] = vars(parser.parse_args(argv))
    names = [options.pop("student"), options.pop("teacher")]
    download, layers = options.pop("allow_download"), options.pop("layers")
    tokenizer, other = (load_tokenizer(name, download) for name in names)
    ids = tokenizer(options["text"])["input_ids"]
    check_tokenizers(tokenizer, other, options["vocab_size"], ids)
    models = [load_model(name, "float32", download) for name in names]
    if layers is not None:
        options["pairs"] = tuple(zip(*layers, strict=True))
    inspect(models[0], models[1], tokenizer, **options)
    _say(f"pictures, numbers and page: {options['output'] / 'inspect.html'}")


def _student(argv: list[str]) -> None:
    from lens_kernels.hf.model.student_command import make_student

    make_student(argv, _say)


def _pair(text: str) -> tuple[int, int]:
    try:
        student, teacher = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two layers such as 5:8, got {text!r}") from None
    return student, teacher


def _demo(args: argparse.Namespace) -> int:
    _prepare(download=False)
    from lens_kernels.hf.training import demo

    folder = args.cache or cache.folder()
    improved = demo.distil(args.output, folder, args.steps, args.seed, _say)
    if not improved:
        print("Some scores did not improve. Train longer, with more --steps", file=sys.stderr)
    return 0 if improved else 1


def _env(args: argparse.Namespace) -> int:
    import torch

    from lens_kernels import __version__, dispatch

    print(f"lens_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"  {package:<13} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"  {package:<13} not installed")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    devices += [
        torch.device(kind)
        for kind in ("mps", "xpu")
        if getattr(torch, kind, None) is not None and getattr(torch, kind).is_available()
    ]
    for device in devices:
        name = f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        print(f"\n{device} ({name})")
        used = [repr(backend.name) for backend in dispatch.automatic(device)]
        which = f"the cheaper of {' and '.join(used)}" if used[1:] else used[0]
        print(f"  backend='auto' uses {which}")
        for backend in dispatch.REGISTRY.values():
            reason = backend.unsupported_reason(device, False)
            if reason is None:
                reserved = backend.auto_excluded_reason(device, None)
                reason = "can run" + (f"; {reserved}" if reserved else "")
            print(f"  {backend.name:<10} {reason}")
    return 0


def _tune(args: argparse.Namespace) -> int:
    import torch

    from lens_kernels import dispatch

    reason = dispatch.REGISTRY["triton"].unsupported_reason(torch.device("cuda"), False)
    if reason is None:
        from lens_kernels.backends.triton import tune
        from lens_kernels.backends.triton.tiles import store

        reason = tune.unsupported_reason()
    if reason is not None:
        print(f"lens-kernels tune: {reason}", file=sys.stderr)
        return 1
    sizes = (args.student_width, args.teacher_width, args.vocab, args.tokens)
    try:
        outcomes = tune.tune(*sizes, getattr(torch, args.dtype), say=_say)
    except OSError as error:
        print(f"lens-kernels tune: cannot store the results: {error}", file=sys.stderr)
        return 1
    print()
    header = ("sweep", "width", "default tile", "ms", "best tile", "ms", "tried", "skipped")
    rows = [header, *(outcome.row() for outcome in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    print(f"\nstored in {store.path()}; later calls on this kind of device use them")
    return 0
