"""The ``lens-kernels`` command."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

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
    args = parser.parse_args(argv)
    return _demo(args) if args.command == "demo" else _env()


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
        from lens_kernels.hf import demo, smollm2
    except ImportError as error:
        print(f"lens-kernels demo needs {error.name}: pip install 'lens-kernels[demo]'")
        return 1

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        improved = demo.run(
            args.output, args.cache or smollm2.default_cache(), args.steps, args.seed, say
        )
    except RuntimeError as error:
        print(f"lens-kernels demo: {error}", file=sys.stderr)
        return 1
    if not improved:
        print("Not every row improved: train for longer (--steps)", file=sys.stderr)
    return 0 if improved else 1


def _env() -> int:
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
