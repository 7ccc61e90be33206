"""How a command reports errors: as one message, without a traceback on the screen."""

from __future__ import annotations

import importlib.util
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
# Advice on how to use less memory, for each command.
LESS = {
    "train": "lower --per_device_train_batch_size or --max_length, or set --gradient_checkpointing",
    "eval": "lower --batch_size, --max_length or --max_new_tokens, or set --dtype bfloat16",
    "inspect": "lower --max_tokens",
}


def guarded(name: str, run: Callable[[], int]) -> int:
    """Run a command and return its exit status. Errors are reported under its ``name``.

    If this package raised the error on purpose, only the error's message is shown. Any other error
    may be a bug, so its traceback is written to a file, and one line names that file.
    """
    try:
        return run()
    except KeyboardInterrupt:
        sys.stderr.write(f"lens-kernels {name}: interrupted\n")
        return 130
    except Exception as error:  # libraries may raise errors of any class
        text = visible(message(error, name), keep=WHITE)
        sys.stderr.write(f"lens-kernels {name}: {text}\n")
        return 1


def message(error: Exception, command: str = "") -> str:
    """Return a message that explains an error and says what to do."""
    text = str(error).strip()
    first = text.split("\n")[0]
    if isinstance(error, MemoryError) or MEMORY.search(text):
        less = LESS.get(command, "use smaller batches, shorter texts or a 16-bit dtype")
        return f"{first or 'out of memory'}. Memory is full: {less}{_kept(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name} is not installed: {install(error.name)}"
    if (isinstance(error, OSError) and error.filename is not None) or _is_own(error):
        return text
    kind, kept = type(error).__name__, _kept(error)
    shown = first if kept else text
    return f"{kind}: {shown}{kept}" if text else f"{kind}{kept}"


def install(module: str) -> str:
    """Return the command that installs a module, if possible through an extra of this package."""
    name = _normal(module.split(".")[0])
    for package, extra in _extras():
        if package == name:
            return f"pip install 'lens-kernels[{extra}]'"
    # pip installs these modules together with transformers. A package may have another name than
    # its module.
    if name in OF_TRANSFORMERS and importlib.util.find_spec("transformers") is None:
        return "pip install 'lens-kernels[hf]'"
    return f"pip install {OF_TRANSFORMERS.get(name, name)}"


# Maps modules that transformers needs to the names of their packages.
OF_TRANSFORMERS = {"yaml": "pyyaml"} | {
    name: name
    for name in ("huggingface-hub", "jinja2", "numpy", "safetensors", "tokenizers", "tqdm")
}


def _extras() -> list[tuple[str, str]]:
    try:
        required = metadata.requires("lens-kernels") or []
    except metadata.PackageNotFoundError:
        return []
    found = [re.match(r"([\w.-]+).*extra == [\"']([\w-]+)[\"']", entry) for entry in required]
    pairs = [(_normal(x[1]), x[2]) for x in found if x]
    return [pair for pair in pairs if pair[1] != "dev"]


def _normal(name: str) -> str:
    return name.replace("_", "-").lower()


def _is_own(error: Exception) -> bool:
    """Return whether the error comes from a ``raise`` in this package."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or PACKAGE not in Path(frames[-1].filename).parents:
        return False
    return not frames[-1].line or frames[-1].line.startswith("raise")


def _kept(error: Exception) -> str:
    """Write the traceback of an error to a file, and return a note that names the file."""
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix="lens-kernels-",
            suffix=".txt",
            delete=False,
            encoding="utf-8",
            errors="backslashreplace",
        ) as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return ""
    return f" (traceback: {file.name})"
