"""The commands ``env`` and ``tune``: this machine's versions, devices and fastest block sizes."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch

from lens_kernels import dispatch
from lens_kernels.version import __version__, version_of

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "liger-kernel", "trl")
DTYPES = ("bfloat16", "float16", "float32")


def describe(say: Callable[[str], None]) -> None:
    """Show versions, devices, and the backend that each device uses."""
    say(f"lens_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        say(f"  {package:<13} {version_of(package) or 'not installed'}")
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
        say(f"\n{device} ({name})")
        used = [repr(backend.name) for backend in dispatch.automatic(device)]
        which = f"the cheaper of {' and '.join(used)}" if used[1:] else used[0]
        say(f"  backend='auto' uses {which}")
        for backend in dispatch.REGISTRY.values():
            reason = backend.unsupported_reason(device, False)
            if reason is None:
                reserved = backend.auto_excluded_reason(device, None)
                reason = "can run" + (f"; {reserved}" if reserved else "")
            say(f"  {backend.name:<10} {reason}")


def tune(
    student_width: int,
    teacher_width: int,
    vocab: int,
    tokens: int = 4096,
    dtype: str = "bfloat16",
    *,
    say: Callable[[str], None],
) -> None:
    """Find the fastest block sizes (tiles) of the Triton kernels, and store them.

    Args:
        student_width: Hidden size of the student.
        teacher_width: Hidden size of the teacher.
        vocab: Vocabulary size.
        tokens: Unmasked tokens in a batch.
        dtype: Dtype of hidden states and heads: bfloat16, float16 or float32.
        say: Called with each line of progress.

    Raises:
        ValueError: A size or the dtype is invalid.
        RuntimeError: This machine cannot run the kernels.
        OSError: The results cannot be stored.
    """
    sizes = (student_width, teacher_width, vocab, tokens)
    for name, size in zip(
        ("student_width", "teacher_width", "vocab", "tokens"), sizes, strict=True
    ):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    reason = dispatch.REGISTRY["triton"].unsupported_reason(torch.device("cuda"), False)
    if reason is None:
        from lens_kernels.backends.triton import tune as search
        from lens_kernels.backends.triton.tiles import store

        reason = search.unsupported_reason()
    if reason is not None:
        raise RuntimeError(reason)
    try:
        outcomes = search.tune(*sizes, getattr(torch, dtype), say=say)
    except OSError as error:
        raise OSError(f"cannot store the results: {error}") from error
    header = ("sweep", "width", "default tile", "ms", "best tile", "ms", "tried", "skipped")
    rows = [header, *(outcome.row() for outcome in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    say("")
    for row in rows:
        say("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    say(f"\nstored in {store.path()}; later calls on this kind of device use them")
