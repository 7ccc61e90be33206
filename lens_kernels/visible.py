"""Makes texts from files and models safe to show in reports."""

from __future__ import annotations

WHITE = " \n\t"  # the white space that reports may contain


def visible(text: str, keep: str = " ") -> str:
    """Escape characters of a text that are invisible or that reorder other characters.

    These are control, format (including bidirectional) and space characters, except those in
    ``keep``.
    """
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def _escape(char: str) -> str:
    return f"\\u{ord(char):04x}"
