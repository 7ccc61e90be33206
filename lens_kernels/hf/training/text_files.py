"""Writes text files without leaving partial files, and reads them with clear errors."""

from __future__ import annotations

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8. Readers see its old or its new content, never a part."""
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
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start + 1}: save it as UTF-8"
        ) from error
