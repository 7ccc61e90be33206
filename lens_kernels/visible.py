"""Texts from files and models, as every report shows them."""

from __future__ import annotations

WHITE = " \n\t"  # white space that a report may hold


def visible(text: str, keep: str = " ") -> str:
    """Return a text with escapes for characters that are invisible or reorder other characters.

    These are control, format (including bidirectional) and space characters, except those in
    ``keep``.
    """
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def _escape(char: str) -> str:
    return f"\\u{ord(char):04x}"
