"""The ``lens-kernels`` command."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from lens_kernels import cache

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "liger-kernel", "trl")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="lens-kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="distil SmolLM2-135M into 20 of its 30 blocks, offline")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for results")
    demo.add_argument("--cache", type=Path, default=None, help="folder for the converted teacher")
    demo.add_argument("--steps", type=_positive, default=40, help="optimiser steps")
    demo.add_argument("--seed", type=int, default=0)
    commands.add_parser("env", help="versions, devices, and the backend that each would use")
    tune = commands.add_parser("tune", help="find the fastest tiles of the Triton kernels")
    tune.add_argument("--student-width", type=_positive, required=True, help="its hidden size")
    tune.add_argument("--teacher-width", type=_positive, required=True, help="its hidden size")
    tune.add_argument("--vocab", type=_positive, required=True, help="entries of the vocabulary")
    tune.add_argument("--tokens", type=_positive, default=4096, help="default %(default)s")
    tune.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args(argv)
    return {"demo": _demo, "env": _env, "tune": _tune}[args.command](args)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _demo(args: argparse.Namespace) -> int:
    # Everything is on the machine already; without this, libraries look for updates on the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from lens_kernels.hf import demo
    except ImportError as error:
        print(f"lens-kernels demo needs {error.name}: pip install 'lens-kernels[demo]'")
        return 1

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        improved = demo.run(args.output, args.cache or cache.folder(), args.steps, args.seed, say)
    except RuntimeError as error:
        print(f"lens-kernels demo: {error}", file=sys.stderr)
        return 1
    if not improved:
        print("Not every row improved: train for longer (--steps)", file=sys.stderr)
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
        print(f"  backend='auto' uses {dispatch.choose('auto', device).name!r}")
        for backend in dispatch.REGISTRY.values():
            reason = backend.objection(device, False)
            if reason is None:
                reason = "can run" if backend.automatic else "can run; only if asked for by name"
            print(f"  {backend.name:<10} {reason}")
    return 0


def _tune(args: argparse.Namespace) -> int:
    import torch

    from lens_kernels import dispatch

    reason = dispatch.REGISTRY["triton"].objection(torch.device("cuda"), False)
    if reason is None:
        from lens_kernels.backends.triton import tuned, tuning

        reason = tuning.objection()
    if reason is not None:
        print(f"lens-kernels tune: {reason}", file=sys.stderr)
        return 1
    sizes = (args.student_width, args.teacher_width, args.vocab, args.tokens)
    try:
        outcomes = tuning.tune(
            *sizes, getattr(torch, args.dtype), say=lambda text: print(text, flush=True)
        )
    except OSError as error:
        print(f"lens-kernels tune: results cannot be kept: {error}", file=sys.stderr)
        return 1
    print()
    header = ("sweep", "width", "usual tile", "ms", "best tile", "ms", "tried", "skipped")
    rows = [header, *(outcome.row() for outcome in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    print(f"\nkept in {tuned.default_path()}, for calls on this kind of device from now on")
    return 0
