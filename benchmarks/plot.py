"""Pictures, drawn from the CSV files alone; nothing is measured here."""

from __future__ import annotations

import csv
import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = {
    "lens_kernels": "#D55E00",
    "triton": "#E69F00",
    "dense": "#555555",
    "dense_kl_div": "#999999",
    "dense_compiled": "#000000",
    "published": "#CC79A7",
    "liger": "#0072B2",
    "liger_uncompiled": "#56B4E9",
    "liger_fused": "#004466",
    "trl": "#009E73",
}
MARKERS = {
    "lens_kernels": "o",
    "triton": "*",
    "dense": "s",
    "dense_kl_div": "s",
    "dense_compiled": "P",
    "published": "X",
    "liger": "^",
    "liger_uncompiled": "v",
    "liger_fused": "<",
    "trl": "D",
}


def memory_vs_vocab(csv_path: Path, png_path: Path) -> bool:
    """Draw memory against vocabulary, a panel for each number of pairs; say if it could be done."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with csv_path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["peak_with_gradients_mib"]]
    panels = sorted({int(row["pairs"]) for row in rows})
    figure = Figure(figsize=(5.2 * len(panels), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    vocabularies = sorted({int(row["vocab_entries"]) for row in rows})
    handles = {}
    for axis, pairs in zip(axes, panels, strict=True):
        for key in dict.fromkeys(row["contender"] for row in rows):
            points = sorted(
                (int(row["vocab_entries"]), float(row["peak_with_gradients_mib"]), row["method"])
                for row in rows
                if row["contender"] == key and int(row["pairs"]) == pairs
            )
            label = next(row["label"] for row in rows if row["contender"] == key)
            colour, front = COLOURS.get(key, "#CC79A7"), key == "lens_kernels"
            style = {"color": colour, "marker": MARKERS.get(key, "o"), "markersize": 6.5}
            style["linewidth"] = 2.6 if front else 1.5
            axis.plot(*zip(*[p[:2] for p in points], strict=True), zorder=3 + front, **style)
            hollow = [p[:2] for p in points if p[2] == "fake"]
            if hollow:
                style |= {"linestyle": "", "markerfacecolor": "white", "markeredgewidth": 1.5}
                axis.plot(*zip(*hollow, strict=True), zorder=4 + front, **style)
            handles[label] = Line2D([], [], color=colour, marker=MARKERS.get(key, "o"))
        gradients = {
            int(row["vocab_entries"]): float(row["gradients_mib"])
            for row in rows
            if int(row["pairs"]) == pairs
        }
        dotted = {"color": "black", "linestyle": ":", "linewidth": 1.4}
        axis.plot(*zip(*sorted(gradients.items()), strict=True), **dotted)
        handles["the gradients alone"] = Line2D([], [], **dotted)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(vocabularies, [_short(v) for v in vocabularies])
        axis.yaxis.set_major_formatter(lambda mib, _: _size(mib))
        axis.minorticks_off()
        axis.grid(color="#DDDDDD", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{pairs} lens pair{'s' if pairs > 1 else ''}", fontsize=12)
        axis.set_xlabel("vocabulary entries")
    axes[0].set_ylabel("peak above the inputs")
    first = rows[0]
    figure.suptitle(
        f"Peak memory of loss + backward: temporaries and gradients\n{first['tokens']} tokens,"
        f" hidden {first['student_width']} (student) and {first['teacher_width']} (teacher),"
        f" {first['dtype']}, {first['device']}",
        fontsize=12,
    )
    if any(row["method"] == "fake" for row in rows):
        hollow_style = {"color": "black", "marker": "o", "linestyle": ""}
        handles["hollow: counted over fake tensors, not run"] = Line2D(
            [], [], markerfacecolor="white", **hollow_style
        )
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False
    )
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=110)
    return True


def _short(vocab: int) -> str:
    return f"{vocab // 1024}k" if vocab % 1024 == 0 else str(vocab)


def _size(mib: float) -> str:
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB"


def study(csv_path: Path, png_path: Path, metrics: Mapping[str, str], arms: Sequence[str]) -> bool:
    """Draw every run of the study as a point, a panel for each metric; say if it could be done."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with csv_path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = 3
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.2 * columns, 0.42 * len(arms) * lines + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axes, (name, label) in zip(grid, metrics.items(), strict=False):
        for height, arm in enumerate(reversed(arms)):
            values = [float(row[name]) for row in rows if row["arm"] == arm]
            if not values:
                continue
            axes.plot(values, [height] * len(values), "o", color="#0072B2", alpha=0.5)
            axes.plot([statistics.fmean(values)], [height], "|", color="#D55E00", ms=16, mew=2)
        axes.set_yticks(range(len(arms)), list(reversed(arms)))
        axes.set_title(label, fontsize=10)
        axes.grid(axis="x", color="#e4e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(metrics) :]:
        axes.set_visible(False)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=110)
    return True


# Column of the CSV along each sweep, and what the axis says.
SPEED_AXES = {
    "tokens": ("tokens", "tokens"),
    "vocab": ("vocab_entries", "vocabulary entries"),
    "pairs": ("pairs", "lens pairs"),
    "mask": ("masked", "share of tokens masked"),
}


def speed_vs_peers(csv_path: Path, png_path: Path) -> bool:
    """Draw time along each sweep, and over the floor for each model; say if it could be done."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with csv_path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["median_ms"]]
    figure = Figure(figsize=(14.5, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    *panels, bars, below = figure.subplots(2, 3).flat
    handles: dict[str, Any] = {}
    for axis, (sweep, (column, label)) in zip(panels, SPEED_AXES.items(), strict=False):
        _speed_lines(axis, [r for r in rows if sweep in r["sweeps"].split()], column, handles)
        axis.set_xlabel(label)
        axis.set_ylabel("seconds")
    of_models = [r for r in rows if "models" in r["sweeps"].split()]
    if of_models:
        _speed_bars(bars, of_models, handles)
    else:
        bars.axis("off")
    below.axis("off")
    below.legend(handles.values(), handles.keys(), loc="center", frameon=False)
    if rows:
        figure.suptitle(
            "Loss + backward: medians of interleaved rounds, from the quickest to the slowest\n"
            f"{rows[0]['dtype']}, {rows[0]['device']}, {rows[0]['threads']} threads"
        )
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=100)
    return True


def _speed_lines(
    axis: Any, rows: Sequence[Mapping[str, str]], column: str, handles: dict[str, Any]
) -> None:
    """Draw a line for each contender."""
    values = sorted({float(row[column]) for row in rows})
    for key in dict.fromkeys(row["contender"] for row in rows):
        points = sorted(
            (float(r[column]), *(float(r[f"{name}_ms"]) / 1e3 for name in ("median", "min", "max")))
            for r in rows
            if r["contender"] == key
        )
        x, y, low, high = zip(*points, strict=True)
        spread = [[a - b for a, b in zip(y, low, strict=True)]]
        spread.append([b - a for a, b in zip(y, high, strict=True)])
        style = {"color": COLOURS.get(key, "black"), "marker": MARKERS.get(key, "")}
        style["linestyle"] = "--" if key == "floor" else "-"
        front = key == "lens_kernels"
        label = next(r["label"] for r in rows if r["contender"] == key)
        width = 2.4 if front else 1.4
        drawn = axis.errorbar(x, y, spread, capsize=3, lw=width, zorder=3 + front, **style)
        handles.setdefault(label, drawn)
    if column != "masked":
        axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.yaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    axis.minorticks_off()
    axis.grid(color="#DDDDDD", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    if rows:
        varies = {"tokens", "vocab_entries", "pairs", "masked"} - {column}
        same = {name: {row[name] for row in rows} for name in varies}
        axis.set_title(_fixed(same), fontsize=10)


def _fixed(values: Mapping[str, set[str]]) -> str:
    """Say what does not change along a sweep."""
    names = {"tokens": "{} tokens", "vocab_entries": "{} entries", "pairs": "{} pair(s)"}
    names["masked"] = "masked: {}"
    shown = (names[name].format(*values[name]) for name in names if len(values.get(name, ())) == 1)
    return ", ".join(shown)


def _speed_bars(axis: Any, rows: Sequence[Mapping[str, str]], handles: dict[str, Any]) -> None:
    """Draw a group of bars for each model."""
    models = [*dict.fromkeys(row["model"] for row in rows)]
    keys = [key for key in dict.fromkeys(row["contender"] for row in rows) if key != "floor"]
    for place, key in enumerate(keys):
        of_key = {row["model"]: row for row in rows if row["contender"] == key}
        left = [
            models.index(name) + (place - (len(keys) - 1) / 2) * 0.8 / len(keys) for name in of_key
        ]
        heights = [float(row["ratio_to_floor"]) for row in of_key.values()]
        axis.bar(left, heights, 0.8 / len(keys), color=COLOURS.get(key, "black"))
    axis.axhline(1, color="black", linestyle="--", linewidth=1.4)
    axis.set_xticks(range(len(models)), models)
    axis.set_ylabel("time / time of the four products")
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"models, {rows[0]['tokens']} tokens, 1 pair", fontsize=10)


# A colour for each student, of Okabe and Ito.
STATE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def active_vocabulary(
    csv_path: Path, png_path: Path, small_error: float, wanted_ratio: float
) -> bool:
    """Draw time over the floor against error, a panel for each group; say if it could be done.

    The error of a threshold is the larger of the hidden states' and the head's.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with csv_path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["median_ms"]]
    runs = [*dict.fromkeys(row["run"] for row in rows)]
    titles = {"lens": "lens pairs (JSD, through the norm)", "final": "final states (forward KL)"}
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(titles), sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for axis, (group, title) in zip(panels, titles.items(), strict=True):
        axis.set_xscale("log")
        beside, marks = axis.get_yaxis_transform(), []
        of_group = [row for row in rows if row["group"] == group]
        states = [*dict.fromkeys((row["run"], row["state"]) for row in of_group)]
        for run, state in states:
            curve = {
                row["threshold"]: (_error(row), float(row["ratio_to_floor"]))
                for row in of_group
                if (row["run"], row["state"]) == (run, state) and row["threshold"] != "floor"
            }
            exact = curve.pop("exact")[1]
            style = {"color": STATE_COLOURS[runs.index(run) % len(STATE_COLOURS)]}
            style["linestyle"] = "--" if state == "before" else "-"
            # What has no error has no place on a logarithmic axis.
            shown = [(name, point) for name, point in curve.items() if point[0]]
            points = dict(sorted(shown, key=lambda item: item[1]))
            x, y = ([point[i] for point in points.values()] for i in (0, 1))
            (drawn,) = axis.plot(x, y, marker="o", ms=4.5, **style)
            handles[f"{run}, {state} training"] = drawn
            axis.plot([0, 0.05], [exact] * 2, transform=beside, lw=2.2, **style)
            marks.append(exact)
            if (run, state) == states[-1]:
                look = {"textcoords": "offset points", "fontsize": 8, "color": style["color"]}
                for name, point in points.items():
                    axis.annotate(name, point, (0, -13), ha="center", **look)
        axis.text(0.06, max(marks), "exact", transform=beside, va="center", fontsize=8)
        axis.axhline(1, color="black", linestyle=":", linewidth=1)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("relative error of the gradients")
        axis.grid(color="#DDDDDD", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time / time of the four products")
    panels[0].set_ylim(bottom=0)
    left, right = panels[0].get_xlim()
    left /= 5  # room for the marks of the exact ones
    for axis in panels:
        axis.fill_between([left, small_error], wanted_ratio, color="#009E73", alpha=0.13, lw=0)
        said = f"error < {small_error:g}, time < {wanted_ratio:g}"
        axis.text(left * 1.3, 0.03, said, fontsize=9, color="#00684C")
        axis.set_xlim(left, right)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    first = rows[0]
    figure.suptitle(
        "grad_threshold, loss + backward: thresholds along each curve\n"
        f"{first['tokens']} tokens, {first['vocab_entries']} entries, widths"
        f" {first['student_width']} and {first['teacher_width']}, {first['device']}"
    )
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=110)
    return True


def _error(row: Mapping[str, str]) -> float:
    return max(float(row["hidden_error"]), float(row["head_error"]))
