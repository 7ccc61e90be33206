"""Rows of results, as CSV files, as Markdown, and as tables on the screen."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CELL = 80  # maximum number of characters in a cell on the screen


def row(columns: str, *parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the named columns, filled from ``parts``. Other columns are empty."""
    values = {name: value for part in parts for name, value in part.items()}
    return {name: values.get(name, "") for name in columns.split()}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys. A key's name includes its unit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_csv(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a CSV at once, so that no row is lost if the program stops.

    All rows of a file have the same keys.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, or no rows if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_own_csv(path: Path, conditions: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the rows that an earlier run wrote under the same ``conditions``, except for the date.

    Raises:
        RuntimeError: The rows were measured under other conditions.
    """
    rows = read_csv(path)
    for each in rows:
        for name, value in conditions.items():
            if name != "date_utc" and each.get(name) != str(value):
                raise RuntimeError(
                    f"{path} was measured with {name} {each.get(name)!r}, but this run has"
                    f" {str(value)!r}; move the file away, or pass another folder to --out"
                )
    return rows


def rewrite(path: Path, begin: str, end: str, content: str) -> None:
    """Replace the lines between two marker lines of a document.

    Raises:
        ValueError: The document does not have both marker lines in this order.
    """
    before, first, rest = path.read_text(encoding="utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{path} must hold the lines {begin!r} and {end!r} in this order")
    path.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}", encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with the first column left-aligned and the others right-aligned."""
    widths = [max(len(cells[i]) for cells in (header, *rows)) for i in range(len(header))]
    for line in (header, ["-" * width for width in widths], *rows):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Print columns of rows, by default all. Empty cells show a dash; long cells are cut."""
    columns = columns or list(rows[0])
    print_table(columns, [[str(each[name])[:CELL] or "-" for name in columns] for each in rows])
