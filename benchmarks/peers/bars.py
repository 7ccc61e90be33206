"""Bounds on the figures of ``speed_vs_peers.py``, and the figures, from its CSV alone.

A ratio of times is taken within each round, where both were timed shortly after one another. The
median over the rounds counts; the lowest and the highest stand beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support import tables
from benchmarks.support.timing import Timing

Row = Mapping[str, str]
Where = tuple[int, int, int, float]  # tokens, vocabulary, pairs, share of masked tokens

BASE: Where = (1024, 50257, 1, 0.0)
HALF: Where = (512, 50257, 1, 0.0)
FIVE: Where = (1024, 50257, 5, 0.5)
LARGE: Where = (2048, 131072, 5, 0.0)
BEGIN = "<!-- made by speed_vs_peers.py --readme from data/cpu/speed_vs_peers.csv -->"
END = "<!-- end of what speed_vs_peers.py made -->"


@dataclass(frozen=True)
class Bar:
    """A bound on what ``top`` takes, divided by what ``bottom`` takes; both at GPT-2's widths."""

    what: str
    top: tuple[str, Where]
    bottom: tuple[str, Where]
    limit: float
    at_most: bool = False
    quantity: str = "times_ms"

    def ratios(self, rows: Sequence[Row]) -> list[float]:
        """Return the ratio in every round that both have, or none if one is missing."""
        top, bottom = (_find(rows, *side) for side in (self.top, self.bottom))
        if top is None or bottom is None:
            return []
        if self.quantity == "times_ms":
            return Timing.read(top["times_ms"]).ratios(Timing.read(bottom["times_ms"]))
        sizes = top[self.quantity], bottom[self.quantity]
        return [float(sizes[0]) / float(sizes[1])] if all(sizes) else []

    def is_met(self, ratio: float) -> bool:
        """Say whether a ratio is within the bound."""
        return ratio <= self.limit if self.at_most else ratio >= self.limit


def _against(peer: str, where: Where, limit: float, name: str, quantity: str = "times_ms") -> Bar:
    return Bar(name, (peer, where), ("lens_kernels", where), limit, quantity=quantity)


def _growth(what: str, larger: Where, smaller: Where, factor: float) -> Bar:
    """Return the bound of 2.1 for each doubling."""
    sides = ("lens_kernels", larger), ("lens_kernels", smaller)
    return Bar(f"lens_kernels, {what}", *sides, 2.1 ** math.log2(factor), at_most=True)


BARS = (
    Bar("lens_kernels / four products", ("lens_kernels", BASE), ("floor", BASE), 1.10, True),
    _against("dense", BASE, 2.4, "dense PyTorch, as lean as can be / lens_kernels"),
    _against("dense_kl_div", BASE, 2.4, "dense PyTorch, F.kl_div / lens_kernels"),
    _against("liger", BASE, 1.2, "Liger, compiled / lens_kernels"),
    _against("trl", BASE, 3.0, "TRL / lens_kernels"),
    _against(
        "published", FIVE, 4.5, "DistillLens as published / lens_kernels, 5 pairs, half masked"
    ),
    _growth("1024 / 512 tokens", BASE, HALF, 2),
    _growth("2048 / 1024 tokens", (2048, *BASE[1:]), BASE, 2),
    _growth("50k / 25k entries", HALF, (512, 25128, 1, 0.0), 2),
    _growth("100k / 50k entries", (512, 100514, 1, 0.0), HALF, 2),
    _growth("5 pairs / 1, half masked", FIVE, (1024, 50257, 1, 0.5), 5),
    _against("dense", LARGE, 50, "temporaries: dense PyTorch / lens_kernels", "temporaries_mib"),
    _against("trl", LARGE, 4, "temporaries: TRL / lens_kernels", "temporaries_mib"),
    _against("trl", LARGE, 1, "time there: TRL / lens_kernels"),
)


def _find(rows: Sequence[Row], contender: str, where: Where) -> Row | None:
    """Return the row of a contender at a point of GPT-2's widths."""
    for row in rows:
        if row["contender"] == contender and row["model"] == "gpt2":
            place = int(row["tokens"]), int(row["vocab_entries"]), int(row["pairs"])
            if (*place, float(row["masked"])) == where:
                return row
    return None


def verdict(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line of cells for each bar: what, the bound, the ratio with its range, the end."""
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


VERDICT = ("ratio", "bound", "measured", "range", "")


def base_times(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line of cells for each contender at the point that most bars are about."""
    lines = []
    for key in dict.fromkeys(row["contender"] for row in rows):
        row = _find(rows, key, BASE)
        if row is None or not row["median_ms"]:
            continue
        spread = f"{float(row['min_ms']) / 1e3:.2f} to {float(row['max_ms']) / 1e3:.2f}"
        cells = [row["label"], f"{float(row['median_ms']) / 1e3:.2f}", spread]
        lines.append([*cells, row["rounds"], row["ratio_to_floor"]])
    return lines


BASE_TIMES = ("1024 tokens, 50257 entries, one pair", "s", "range", "rounds", "of the products")


def both_tables(rows: Sequence[Row]) -> list[tuple[Sequence[str], list[list[str]]]]:
    """Return header and lines of the times and of the verdict."""
    return [(BASE_TIMES, base_times(rows)), (VERDICT, verdict(rows))]


def write_tables(path: Path, rows: Sequence[Row]) -> None:
    """Write the tables of a README anew; ValueError if it has no place for them."""
    made = [tables.markdown_table(*table) for table in both_tables(rows) if table[1]]
    tables.rewrite(path, BEGIN, END, "\n\n".join(made))
