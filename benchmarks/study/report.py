"""The tables of the study, made of its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.study import statistics
from benchmarks.study.groups import Group
from benchmarks.study.statistics import Compared, Difference
from benchmarks.support import tables

HEADER = (
    *("objective", "seeds", "KL(teacher, student)", "against", "difference, %"),
    *("95 % bootstrap", "95 % Student's t", "verdict", "steps to its end, %", "CPU ms a step"),
)


def table(group: Group, results: statistics.Results, seeds: Sequence[int] | None = None) -> str:
    """Return the comparison of a group as Markdown."""
    found = statistics.compare(group, results, seeds=seeds)
    if not found:
        return "No run is done yet."
    return tables.markdown_table(HEADER, [_line(each) for each in found])


def _line(each: Compared) -> list[str]:
    kl = f"{each.mean:.4f}" + (f" ± {each.deviation:.4f}" if len(each.seeds) > 1 else "")
    start = [each.arm.label, str(len(each.seeds)), kl]
    end = f"{each.cpu_ms:.0f}"
    if each.percent is None:
        return [*start, "", "", "", "", "", "", end]
    reached = "not reached" if each.reached is None else f"{100 * each.reached:.0f}"
    return [*start, each.arm.versus or "", *_difference(each.percent), reached, end]


def _difference(percent: Difference) -> list[str]:
    intervals = [
        "" if each is None else f"[{each[0]:+.2f}, {each[1]:+.2f}]"
        for each in (percent.bootstrap, percent.student_t)
    ]
    return [f"{percent.mean:+.2f}", *intervals, percent.verdict]


def publish(csv: Path) -> None:
    """Write the CSV, tables and figures that the documents show."""
    raise NotImplementedError(csv)
