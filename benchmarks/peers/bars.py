"""Limits for the results of ``speed_vs_peers.py``, and the tables that are made from its CSV.

Ratios are taken within each round, in which both times were measured shortly after each other. The
median ratio is compared with the limit, and printed with the lowest and the highest ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.points import FLOOR, Point
from benchmarks.support import tables
from benchmarks.support.shapes import Job
from benchmarks.support.timing import Timing

Row = Mapping[str, str]


def at(tokens: int = 1024, vocab: int = 50257, pairs: int = 1, masked: float = 0.0) -> str:
    """Return the name of a point (a set of sizes) with the hidden sizes of GPT-2."""
    return Point((), "gpt2", Job(tokens, vocab, pairs, masked=masked)).key()


BASE, HALF, FIVE = at(), at(512), at(pairs=5, masked=0.5)
LARGE = at(2048, 131072, 5)
BEGIN = "<!-- made by speed_vs_peers.py --docs from data/cpu/speed_vs_peers.csv -->"
END = "<!-- end of what speed_vs_peers.py made -->"


@dataclass(frozen=True)
class Bar:
    """A limit for the ratio of two measurements, ``top / bottom``.

    ``top`` and ``bottom`` are (point, contender). ``quantity`` is the column of the CSV.
    """

    what: str
    top: tuple[str, str]
    bottom: tuple[str, str]
    limit: float
    at_most: bool = False
    quantity: str = "times_ms"

    def ratios(self, rows: Sequence[Row]) -> list[float]:
        """Return the ratio in each round, or an empty list if a measurement is missing."""
        found = {(row["point"], row["contender"]): row[self.quantity] for row in rows}
        top, bottom = found.get(self.top), found.get(self.bottom)
        if not top or not bottom:
            return []
        if self.quantity == "times_ms":
            return Timing.read(top).ratios(Timing.read(bottom))
        return [float(top) / float(bottom)]

    def is_met(self, ratio: float) -> bool:
        """Return whether a ratio is within the limit."""
        return ratio <= self.limit if self.at_most else ratio >= self.limit


def _against(peer: str, point: str, limit: float, name: str, quantity: str = "times_ms") -> Bar:
    return Bar(name, (point, peer), (point, "lens_kernels"), limit, quantity=quantity)


def _growth(what: str, larger: str, smaller: str, factor: float = 2) -> Bar:
    sides = (larger, "lens_kernels"), (smaller, "lens_kernels")
    return Bar(f"lens_kernels, {what}", *sides, 2.1 ** math.log2(factor), at_most=True)


MEMORY = "temporary memory, large size"
PUBLISHED = "DistillLens as published / lens_kernels, 5 pairs, half masked"
BARS = (
    Bar("lens_kernels / four GEMMs", (BASE, "lens_kernels"), (BASE, FLOOR), 1.10, True),
    _against("dense", BASE, 2.4, "dense PyTorch, lean / lens_kernels"),
    _against("dense_kl_div", BASE, 2.4, "dense PyTorch, F.kl_div / lens_kernels"),
    _against("liger", BASE, 1.2, "Liger, compiled / lens_kernels"),
    _against("trl", BASE, 3.0, "TRL / lens_kernels"),
    _against("published", FIVE, 4.5, PUBLISHED),
    _growth("1024 / 512 tokens", BASE, HALF),
    _growth("2048 / 1024 tokens", at(2048), BASE),
    _growth("50k / 25k entries", HALF, at(512, 25128)),
    _growth("100k / 50k entries", at(512, 100514), HALF),
    _growth("5 pairs / 1, half masked", FIVE, at(masked=0.5), 5),
    _against("dense", LARGE, 50, f"{MEMORY}: dense PyTorch / lens_kernels", "temporaries_mib"),
    _against("trl", LARGE, 4, f"{MEMORY}: TRL / lens_kernels", "temporaries_mib"),
    _against("trl", LARGE, 1, "time, large size: TRL / lens_kernels"),
)
VERDICT = ("ratio", "bound", "measured", "range", "")
BASE_TIMES = ("1024 tokens, 50257 entries, one pair", "s", "range", "rounds", "time / four GEMMs")


def verdict(rows: Sequence[Row]) -> list[list[str]]:
    """Return a table row for each limit, with the ratio, its range, and ``met`` or ``missed``."""
    lines = []
    for bar in BARS:
        found = bar.ratios(rows)
        bound = f"{'at most' if bar.at_most else 'at least'} {bar.limit:.2f}"
        if not found:
            lines.append([bar.what, bound, "", "", "not measured"])
            continue
        middle = statistics.median(found)
        spread = f"{min(found):.2f} to {max(found):.2f}" if len(found) > 1 else "once"
        end = "met" if bar.is_met(middle) else "missed"
        lines.append([bar.what, bound, f"{middle:.2f}", spread, end])
    return lines


def base_times(rows: Sequence[Row]) -> list[list[str]]:
    """Return a table row for each contender, with its times at the sizes ``BASE``."""
    lines, order = [], [*dict.fromkeys(row["contender"] for row in rows)]
    for row in sorted(rows, key=lambda row: order.index(row["contender"])):
        if row["point"] == BASE and row["median_ms"]:
            median, low, high = (float(row[f"{x}_ms"]) / 1e3 for x in ("median", "min", "max"))
            cells = [row["label"], f"{median:.2f}", f"{low:.2f} to {high:.2f}"]
            lines.append([*cells, row["rounds"], row["ratio_to_floor"]])
    return lines


def both_tables(rows: Sequence[Row]) -> list[tuple[Sequence[str], list[list[str]]]]:
    """Return two tables, each as a header and rows: times, and ratios with their limits."""
    return [(BASE_TIMES, base_times(rows)), (VERDICT, verdict(rows))]


def write_tables(path: Path, rows: Sequence[Row]) -> None:
    """Replace the tables on a page. Raise ValueError if the page has no markers for them."""
    made = [tables.markdown_table(*table) for table in both_tables(rows) if table[1]]
    tables.rewrite(path, BEGIN, END, "\n\n".join(made))
