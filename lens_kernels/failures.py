"""How the command reports errors: one message, and no traceback on the screen."""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from lens_kernels.visible import WHITE, visible

PACKAGE = Path(__file__).parent
MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def guarded(name: str, run: Callable[[], int]) -> int:
    """Return the exit status of ``run``. If it raises, report the error for the command ``name``.

    For an error that this package raised on purpose, only its message is shown. Any other error may
    be a bug, so its traceback is written to a file, and the message names the file.
    """
    try:
        return run()
    except KeyboardInterrupt:
        sys.stderr.write(f"lens-kernels {name}: interrupted\n")
        return 130
    except Exception as error:  # a library may raise errors of any kind
        sys.stderr.write(f"lens-kernels {name}: {visible(message(error), keep=WHITE)}\n")
        return 1


def message(error: Exception) -> str:
    """Return a message that says what is wrong and what to do."""
    text = str(error).strip()
    if isinstance(error, MemoryError) or MEMORY.search(text):
        first = text.split("\n")[0] or "out of memory"
        return (
            f"{first}. Memory is full: use smaller batches, shorter texts or a 16-bit dtype"
            f"{_kept(error)}"
        )
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name} is not installed: {install(error.name)}"
    if isinstance(error, OSError) or _is_own(error):
        return text
    kind = type(error).__name__
    return f"{kind}: {text}{_kept(error)}" if text else f"{kind}{_kept(error)}"


def install(module: str) -> str:
    """Return the command that installs a module, through an extra of this package if possible."""
    name = module.split(".")[0].replace("_", "-").lower()
    try:
        required = metadata.requires("lens-kernels") or []
    except metadata.PackageNotFoundError:
        required = []
    for entry in required:
        found = re.match(r"([\w.-]+).*extra == [\"']([\w-]+)[\"']", entry)
        if found and found[1].replace("_", "-").lower() == name:
            return f"pip install 'lens-kernels[{found[2]}]'"
    return f"pip install {name}"


def _is_own(error: Exception) -> bool:
    """Return whether code of this package raised the error itself."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in Path(frames[-1].filename).parents


def _kept(error: Exception) -> str:
    """Write the traceback to a file, and return a note that names the file."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lens-kernels-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return ""
    return f" (traceback: {file.name})"
