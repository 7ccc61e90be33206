"""The tables of the study. They are made from the CSV of its results alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.study import figures, runs, statistics
from benchmarks.study.groups import GROUPS, Group
from benchmarks.study.statistics import Compared
from benchmarks.support import environment, tables

CSV = environment.DATA / "cpu" / "lens_study.csv"
FIGURES = environment.ROOT / "benchmarks" / "figures"
PAGE = environment.ROOT / "docs" / "study.md"
# Both lens pairs of the pretrained group, the last block without a pair, and the output.
PRETRAINED_DEPTHS = (7, 13, 19, 20)
HEADER = (
    *("objective", "seeds", "KL(teacher, student)", "against", "difference, %"),
    *("95 % bootstrap", "95 % Student's t", "verdict"),
    *("steps to its end, %", "CPU ms a step", "CPU time to its end, %"),
)
OTHERS = {
    "ce": "cross entropy",
    "reverse_kl": "KL(student, teacher)",
    "entropy": "entropy",
    "overconfident": "more confident than the teacher",
    "calibration_error": "calibration error",
    "agreement": "same first choice",
    "greedy_prefix": "tokens of the same continuation",
}


def table(group: Group, results: statistics.Results, seeds: Sequence[int] | None = None) -> str:
    """Return a group's comparisons as a Markdown table."""
    found = statistics.compare(group, results, seeds=seeds)
    if not found:
        return "No run is done yet."
    return tables.markdown_table(HEADER, [_line(each) for each in found])


def _line(each: Compared) -> list[str]:
    kl = f"{each.mean:.4f}" + (f" ± {each.deviation:.4f}" if len(each.seeds) > 1 else "")
    start = [each.arm.label, str(len(each.seeds)), kl]
    cpu = f"{each.cpu_ms:.0f}"
    if each.percent is None or each.cost is None:
        return [*start, "", "", "", "", "", "", cpu, ""]
    intervals = [
        "" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"
        for interval in (each.percent.bootstrap, each.percent.student_t)
    ]
    difference = [f"{each.percent.mean:+.2f}", *intervals, each.percent.verdict]
    reached, time = "not reached", "not reached"
    if each.reached is not None:
        reached, time = f"{100 * each.reached:.0f}", f"{100 * each.reached * each.cost:.0f}"
    return [*start, each.arm.versus or "", *difference, reached, cpu, time]


def others(group: Group, results: statistics.Results) -> str:
    """Return a group's other metrics as a Markdown table.

    A star marks differences that are larger than the noise.
    """
    columns = {
        metric: {x.arm.label: x for x in statistics.compare(group, results, metric, absolute=True)}
        for metric in OTHERS
    }
    labels = [arm.label for arm in group.arms if arm.label in columns["ce"]]
    if not labels:
        return "No run is done yet."
    lines = []
    for label in labels:
        cells = [label]
        for metric in OTHERS:
            each = columns[metric][label]
            beyond = each.percent is not None and each.percent.verdict in ("lower", "higher")
            cells.append(f"{each.mean:.4g}" + (" *" if beyond else ""))
        lines.append(cells)
    return tables.markdown_table(["objective", *OTHERS.values()], lines)


def lenses(group: Group, results: statistics.Results, depths: Sequence[int]) -> str:
    """Return a Markdown table of each objective's KL(teacher, student) of lenses at ``depths``."""
    lines = []
    for arm in group.arms:
        means = dict(statistics.by_depth(arm, results, group.seeds, "kl"))
        if means:
            lines.append([arm.label, *(f"{means[depth]:.3f}" for depth in depths)])
    header = ["objective", *(f"block {depth}" for depth in depths)]
    return tables.markdown_table(header, lines) if lines else "No run is done yet."


def origin(results: Sequence[Mapping[str, str]]) -> str:
    """Return a sentence with the machines, versions and commits of the results."""
    said = [f"{len(results)} runs"]
    for column in ("commit", "device", "threads", "torch", "transformers", "shared_machine"):
        counts = Counter(row[column] for row in results)
        values = [x if len(counts) == 1 else f"{x} ({n} runs)" for x, n in counts.most_common()]
        said.append(f"{column.replace('_', ' ')} {', '.join(values)}")
    hours = sum(float(row["seconds"]) for row in results) / 3600
    return "; ".join([*said, f"{hours:.1f} hours of runs"]) + "."


def by_machine(results: Sequence[Mapping[str, str]]) -> list[dict[str, Mapping[str, str]]]:
    """Return the results of each machine by the key of their run, in the order of the results."""
    found: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in results:
        found.setdefault(row["device"], {})[row["key"]] = row
    return [*found.values()]


def select(machines: Sequence[statistics.Results]) -> dict[str, tuple[Group, statistics.Results]]:
    """Return each group with the results of one machine, because machines round differently.

    It is the machine with results of most of the objectives, then with most runs, then the first.
    ``again`` is the main group on the next machine.
    """

    def ranked(group: Group) -> list[statistics.Results]:
        def count(results: statistics.Results) -> tuple[int, int]:
            found = [len(statistics.of(arm, results, group.seeds)) for arm in group.arms]
            return sum(map(bool, found)), sum(found)

        return sorted(machines, key=count, reverse=True)

    selected = {name: (group, ranked(group)[0]) for name, group in GROUPS.items()}
    main = GROUPS["main"]
    again = replace(main, name="again", question="Does another processor say the same?")
    return selected | {"again": (again, [*ranked(main), {}][1])}


def rounding(group: Group, one: statistics.Results, other: statistics.Results) -> str:
    """Return a sentence with the differences of equal runs of two machines."""
    keys = [run.key for run in group.runs() if run.key in one and run.key in other]
    if not keys:
        return ""
    ratios = [float(other[key]["kl"]) / float(one[key]["kl"]) for key in keys]
    gaps = sorted(abs(100 * (ratio - 1)) for ratio in ratios)
    return (
        f"{len(keys)} runs were made on both machines. The two values of KL(teacher, student) of a"
        f" run differ by {median(gaps):.1f} % in the median, and by {gaps[-1]:.1f} % at most."
    )


def publish(
    csvs: Sequence[Path], page: Path = PAGE, kept: Path = CSV, folder: Path = FIGURES
) -> None:
    """Write the CSV, the tables and the figures that the documentation shows."""
    merged = {(row["device"], row["key"]): row for csv in csvs for row in runs.rows(csv)}
    results = [*merged.values()]
    tables.write_csv(kept, results)
    machines = by_machine(results)
    selected = select(machines)
    drawn = {path.stem: path for path in figures.all_of(selected, folder)}

    def picture(name: str, said: str) -> str:
        if name not in drawn:
            return ""
        return f"\n\n![{said}]({os.path.relpath(drawn[name], page.parent)})"

    contents = {
        "origin": origin(results),
        "others": others(*selected["main"]),
        "depth": picture("study_depth", "Lenses by depth").strip(),
        "pretrained_depth": lenses(*selected["pretrained"], PRETRAINED_DEPTHS)
        + picture("study_pretrained_depth", "Lenses of SmolLM2 by depth"),
        "penalties": picture("study_penalties", "Penalty and gradient of each divergence").strip(),
        "rounding": rounding(*selected["main"], selected["again"][1]),
    }
    for name, (group, own) in selected.items():
        devices = {row["device"] for row in own.values()} if len(machines) > 1 else ()
        machine = "".join(f"\n\nMachine: {device}." for device in devices)
        contents[name] = table(group, own) + machine + picture(f"study_{name}", group.question)
    for name, content in contents.items():
        tables.rewrite(page, f"<!-- {name} -->", f"<!-- end of {name} -->", content)
