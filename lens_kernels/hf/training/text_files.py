"""Files that are never left half written, and errors that name them."""

from __future__ import annotations

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 in one step: a reader sees the old file or the whole new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8.

    Raises:
        ValueError: The file is not valid UTF-8.
        OSError: The file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start + 1}: save it so") from error
