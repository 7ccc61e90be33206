"""Figures, drawn from the CSV files alone: one style, and a function for each figure."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.support import tables

Rows = list[dict[str, str]]
# Okabe and Ito's colours, which colour-blind readers can tell apart; and a marker.
STYLES = {
    "floor": ("#000000", ""),
    "lens_kernels": ("#D55E00", "o"),
    "triton": ("#E69F00", "*"),
    "dense": ("#555555", "s"),
    "dense_kl_div": ("#999999", "s"),
    "dense_compiled": ("#000000", "P"),
    "published": ("#CC79A7", "X"),
    "liger": ("#0072B2", "^"),
    "liger_uncompiled": ("#56B4E9", "v"),
    "liger_fused": ("#004466", "<"),
    "trl": ("#009E73", "D"),
}
STUDENTS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = {"color": "#DDDDDD", "linewidth": 0.7}


def figure(draw: Callable[..., Any]) -> Callable[..., str]:
    """Make a function of a CSV's rows one of its path; it writes a PNG beside it, or at ``png``.

    It returns the PNG's path, or says why there is none.
    """

    @functools.wraps(draw)
    def written(csv: Path, *args: Any, png: Path | None = None) -> str:
        if reason := no_matplotlib():
            return reason
        png = png or csv.with_suffix(".png")
        png.parent.mkdir(parents=True, exist_ok=True)
        draw(tables.read_csv(csv), *args).savefig(png)
        return str(png)

    return written


def no_matplotlib() -> str | None:
    """Say that there can be no figure, or return None."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return "no picture: matplotlib is not installed; pip install matplotlib"


def _canvas(width: float, height: float, dpi: int = 110) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def _finish(axis: Any, title: str, size: int = 10, grid: str = "both", **labels: str) -> None:
    """Set title, labels, grid and frame of a panel."""
    axis.set_title(title, fontsize=size)
    axis.set(**labels)
    axis.grid(axis=grid, **GREY)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _log2(
    axis: Any, ticks: Mapping[float, str], said: Callable[[float], str], x_too: bool = True
) -> None:
    """Make the vertical axis logarithmic, or both axes."""
    if x_too:
        axis.set_xscale("log", base=2)
    axis.set_xticks([*ticks], [*ticks.values()])
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: said(value))
    axis.minorticks_off()


def _by(rows: Rows, *columns: str) -> dict[Any, Rows]:
    """Return the rows by what they have in some columns, in the order of their first one."""
    groups: dict[Any, Rows] = {}
    for row in rows:
        key = tuple(row[name] for name in columns)
        groups.setdefault(key if len(key) > 1 else key[0], []).append(row)
    return groups


def _numbers(rows: Rows, *columns: str) -> list[tuple[float, ...]]:
    """Return columns of rows as numbers, sorted by the first one."""
    return [*zip(*sorted(tuple(float(r[name]) for name in columns) for r in rows), strict=True)]


@figure
def memory_vs_vocab(rows: Rows) -> Any:
    """Draw memory against vocabulary, a panel for each number of pairs."""
    from matplotlib.lines import Line2D

    rows = [row for row in rows if row["peak_with_gradients_mib"]]
    panels = sorted(_by(rows, "pairs").items(), key=lambda item: int(item[0]))
    ticks = {
        v: f"{v // 1024}k" if v % 1024 == 0 else str(v)
        for v in sorted(int(r["vocab_entries"]) for r in rows)
    }
    drawn = _canvas(5.2 * len(panels), 5.2)
    axes = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axis, (pairs, at) in zip(axes, panels, strict=True):
        for key, own in _by(at, "contender").items():
            colour, marker = STYLES[key]
            front = key == "lens_kernels"
            line = {"color": colour, "marker": marker, "markersize": 6.5}
            line["linewidth"] = 2.6 if front else 1.5
            xy = "vocab_entries", "peak_with_gradients_mib"
            axis.plot(*_numbers(own, *xy), zorder=3 + front, **line)
            if fakes := [row for row in own if row["method"] == "fake"]:
                line |= {"linestyle": "", "markerfacecolor": "white", "markeredgewidth": 1.5}
                axis.plot(*_numbers(fakes, *xy), zorder=4 + front, **line)
            handles[own[0]["label"]] = Line2D([], [], color=colour, marker=marker)
        dotted = {"color": "black", "linestyle": ":", "linewidth": 1.4}
        axis.plot(*_numbers(at, "vocab_entries", "gradients_mib"), **dotted)
        handles["the gradients alone"] = Line2D([], [], **dotted)
        _log2(axis, ticks, lambda mib: f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB")
        title = f"{pairs} lens pair{'s' if int(pairs) > 1 else ''}"
        _finish(axis, title, 12, xlabel="vocabulary entries")
    axes[0].set_ylabel("peak above the inputs")
    first = rows[0]
    drawn.suptitle(
        f"Peak memory of loss + backward: temporaries and gradients\n{first['tokens']} tokens,"
        f" hidden {first['student_width']} (student) and {first['teacher_width']} (teacher),"
        f" {first['dtype']}, {first['device']}",
        fontsize=12,
    )
    if any(row["method"] == "fake" for row in rows):
        hollow = {"color": "black", "marker": "o", "linestyle": "", "markerfacecolor": "white"}
        handles["hollow: counted over fake tensors, not run"] = Line2D([], [], **hollow)
    drawn.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False)
    return drawn


# Column of the CSV along each sweep, and the label of the axis.
SPEED_AXES = {
    "tokens": ("tokens", "tokens"),
    "vocab": ("vocab_entries", "vocabulary entries"),
    "pairs": ("pairs", "lens pairs"),
    "mask": ("masked", "share of tokens masked"),
}
FIXED = {
    "tokens": "{} tokens",
    "vocab_entries": "{} entries",
    "pairs": "{} pair(s)",
    "masked": "masked: {}",
}


@figure
def speed_vs_peers(rows: Rows) -> Any:
    """Draw time along each sweep, and over the floor for each model."""
    rows = [row for row in rows if row["median_ms"]]
    drawn = _canvas(14.5, 8.6, dpi=100)
    *panels, bars, below = drawn.subplots(2, 3).flat
    handles: dict[str, Any] = {}
    for axis, (sweep, (column, label)) in zip(panels, SPEED_AXES.items(), strict=False):
        along = [row for row in rows if sweep in row["sweeps"].split()]
        for name, line in _speed_lines(axis, along, column).items():
            handles.setdefault(name, line)
        axis.set(xlabel=label, ylabel="seconds")
    if of_models := [row for row in rows if "models" in row["sweeps"].split()]:
        _speed_bars(bars, of_models)
    else:
        bars.axis("off")
    below.axis("off")
    below.legend(handles.values(), handles, loc="center", frameon=False)
    if rows:
        drawn.suptitle(
            "Loss + backward: medians of interleaved rounds, from the quickest to the slowest\n"
            f"{rows[0]['dtype']}, {rows[0]['device']}, {rows[0]['threads']} threads"
        )
    return drawn


def _speed_lines(axis: Any, rows: Rows, column: str) -> dict[str, Any]:
    """Draw a line for each contender, and return the lines by label."""
    lines = {}
    for key, own in _by(rows, "contender").items():
        x, *times = _numbers(own, column, "median_ms", "min_ms", "max_ms")
        y, low, high = ([ms / 1e3 for ms in each] for each in times)
        spread = [[a - b for a, b in zip(*ends, strict=True)] for ends in ((y, low), (high, y))]
        front = key == "lens_kernels"
        style = {"color": STYLES[key][0], "marker": STYLES[key][1], "lw": 2.4 if front else 1.4}
        style["linestyle"] = "--" if key == "floor" else "-"
        label = own[0]["label"]
        lines[label] = axis.errorbar(x, y, spread, capsize=3, zorder=3 + front, **style)
    ticks = {value: f"{value:g}" for value in sorted({float(row[column]) for row in rows})}
    _log2(axis, ticks, lambda seconds: f"{seconds:g}", x_too=column != "masked")
    fixed = {name: {row[name] for row in rows} for name in FIXED if name != column}
    said = (FIXED[name].format(*values) for name, values in fixed.items() if len(values) == 1)
    _finish(axis, ", ".join(said))
    return lines


def _speed_bars(axis: Any, rows: Rows) -> None:
    """Draw a group of bars for each model."""
    models = [*_by(rows, "model")]
    contenders = _by([row for row in rows if row["contender"] != "floor"], "contender")
    width = 0.8 / len(contenders)
    for place, (key, own) in enumerate(contenders.items()):
        shift = (place - (len(contenders) - 1) / 2) * width
        left = [models.index(row["model"]) + shift for row in own]
        axis.bar(left, [float(row["ratio_to_floor"]) for row in own], width, color=STYLES[key][0])
    axis.axhline(1, color="black", linestyle="--", linewidth=1.4)
    axis.set_xticks(range(len(models)), models)
    title = f"models, {rows[0]['tokens']} tokens, 1 pair"
    _finish(axis, title, grid="y", ylabel="time / time of the four products")


@figure
def active_vocabulary(rows: Rows, small_error: float, wanted_ratio: float) -> Any:
    """Draw time over the floor against error, a panel for each group.

    The error of a threshold is the larger of the hidden states' and the head's.
    """
    rows = [row for row in rows if row["median_ms"] and row["threshold"] != "floor"]
    runs = [*_by(rows, "run")]
    titles = {"lens": "lens pairs (JSD, through the norm)", "final": "final states (forward KL)"}
    drawn = _canvas(12, 5.4)
    panels = drawn.subplots(1, len(titles), sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for axis, (group, title) in zip(panels, titles.items(), strict=True):
        axis.set_xscale("log")
        beside, marks = axis.get_yaxis_transform(), []
        of_group = [row for row in rows if row["group"] == group]
        for (run, state), own in _by(of_group, "run", "state").items():
            style = {"color": STUDENTS[runs.index(run) % len(STUDENTS)]}
            style["linestyle"] = "--" if state == "before" else "-"
            points = {row["threshold"]: (_error(row), float(row["ratio_to_floor"])) for row in own}
            marks.append(points.pop("exact")[1])
            # A logarithmic axis cannot show what has no error.
            curve = sorted((*point, name) for name, point in points.items() if point[0])
            x, y = ([point[i] for point in curve] for i in (0, 1))
            (handles[f"{run}, {state} training"],) = axis.plot(x, y, marker="o", ms=4.5, **style)
            axis.plot([0, 0.05], marks[-1:] * 2, transform=beside, lw=2.2, **style)
        look = {"textcoords": "offset points", "fontsize": 8, "color": style["color"]}
        for *point, name in curve:  # the last one carries the names
            axis.annotate(name, point, (0, -13), ha="center", **look)
        axis.text(0.06, max(marks), "exact", transform=beside, va="center", fontsize=8)
        axis.axhline(1, color="black", linestyle=":", linewidth=1)
        _finish(axis, title, 11, xlabel="relative error of the gradients")
    panels[0].set_ylabel("time / time of the four products")
    panels[0].set_ylim(bottom=0)
    left, right = panels[0].get_xlim()
    left /= 5  # room for the marks of the exact ones
    for axis in panels:
        axis.fill_between([left, small_error], wanted_ratio, color="#009E73", alpha=0.13, lw=0)
        said = f"error < {small_error:g}, time < {wanted_ratio:g}"
        axis.text(left * 1.3, 0.03, said, fontsize=9, color="#00684C")
        axis.set_xlim(left, right)
    drawn.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    first = rows[0]
    drawn.suptitle(
        "grad_threshold, loss + backward: thresholds along each curve\n"
        f"{first['tokens']} tokens, {first['vocab_entries']} entries, widths"
        f" {first['student_width']} and {first['teacher_width']}, {first['device']}"
    )
    return drawn


def _error(row: Mapping[str, str]) -> float:
    return max(float(row["hidden_error"]), float(row["head_error"]))
