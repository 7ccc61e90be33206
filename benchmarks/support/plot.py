"""The figures of the benchmarks. Each function draws one figure from a CSV file.

python -m benchmarks.support.plot    redraws the figures of benchmarks/figures/
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.support import environment, tables
from benchmarks.support.shapes import MODELS
from benchmarks.support.timing import Timing
from lens_kernels import pictures
from lens_kernels.pictures import HOLLOW, LOWER

Row = Mapping[str, str]
Rows = list[dict[str, str]]
# The colour and marker of each implementation. Dense PyTorch is grey.
STYLES = {
    "floor": (pictures.BLACK, ""),
    "lens_kernels": (pictures.VERMILION, "o"),
    "dense": (pictures.GREY, "s"),
    "dense_kl_div": (pictures.LIGHT_GREY, "p"),
    "dense_compiled": (pictures.BLACK, "P"),
    "published": (pictures.PURPLE, "X"),
    "liger": (pictures.BLUE, "^"),
    "liger_uncompiled": (pictures.SKY, "v"),
    "trl": (pictures.GREEN, "D"),
}
STUDENTS = (pictures.BLUE, pictures.VERMILION, pictures.GREEN, pictures.PURPLE, pictures.ORANGE)
# The goal of the approximation: its error should be below the first number. Its time, divided by
# that of the GEMMs alone, should be below the second.
SMALL_ERROR, WANTED_RATIO = 1e-3, 0.80
GEMMS = f"time / time of the four GEMMs\n({LOWER})"


def figure(draw: Callable[[Rows], Any]) -> Callable[..., str]:
    """Turn a function that draws rows into a function that reads a CSV and writes a picture.

    The picture is written to ``png``, by default next to the CSV. The new function returns the path
    of the picture, or a message if there is no picture.
    """

    @pictures.styled
    def write(csv: Path, png: Path) -> None:
        png.parent.mkdir(parents=True, exist_ok=True)
        pictures.save(draw(tables.read_csv(csv)), png)

    @functools.wraps(draw)
    def written(csv: Path, png: Path | None = None) -> str:
        if reason := no_matplotlib():
            return reason
        png = png or csv.with_suffix(".png")
        write(csv, png)
        return str(png)

    return written


def no_matplotlib() -> str | None:
    """Return a message if matplotlib is not installed, else None."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return "no picture: matplotlib is not installed; pip install matplotlib"


def _log2(axis: Any, said: Callable[[float], str]) -> None:
    """Make the vertical axis logarithmic. ``said`` returns the label of each tick."""
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: said(value))
    axis.minorticks_off()


def _by(rows: Rows, *columns: str) -> dict[Any, Rows]:
    groups: dict[Any, Rows] = {}
    for row in rows:
        key = tuple(row[name] for name in columns)
        groups.setdefault(key if len(key) > 1 else key[0], []).append(row)
    return groups


def _numbers(rows: Rows, *columns: str) -> list[tuple[float, ...]]:
    return [*zip(*sorted(tuple(float(r[name]) for name in columns) for r in rows), strict=True)]


def _size(mib: float) -> str:
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB"


def _pairs(count: str) -> str:
    return f"{count} lens pair{'s'[: int(count) > 1]}"


def _key(color: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, **style)


def _legend(drawn: Any, handles: Mapping[str, Any], columns: int) -> None:
    drawn.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


@figure
def memory_vs_vocab(rows: Rows) -> Any:
    """Draw memory against vocabulary size, with one panel for each number of pairs."""
    rows = [row for row in rows if row["peak_with_gradients_mib"]]
    panels = sorted(_by(rows, "pairs").items(), key=lambda item: int(item[0]))
    drawn = pictures.canvas(4.6 * len(panels), 4.6)
    axes = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    xy, handles = ("vocab_entries", "peak_with_gradients_mib"), {}
    for axis, (pairs, at) in zip(axes, panels, strict=True):
        for key, own in _by(at, "contender").items():
            colour, marker = STYLES[key]
            front = key == "lens_kernels"
            style = {"color": colour, "marker": marker, "zorder": 3 + front}
            handles[own[0]["label"]] = _key(colour, marker=marker)
            axis.plot(*_numbers(own, *xy), linewidth=2.4 if front else 1.5, **style)
            if fakes := [row for row in own if row["method"] == "fake"]:
                axis.plot(*_numbers(fakes, *xy), linestyle="", **style, **HOLLOW)
        dotted = {"color": pictures.BLACK, "linestyle": ":"}
        axis.plot(*_numbers(at, "vocab_entries", "gradients_mib"), **dotted)
        axis.set_xscale("log", base=2)
        ticks = sorted({int(row["vocab_entries"]) for row in rows})
        axis.set_xticks(ticks, [f"{v // 1024}k" if v % 1024 == 0 else str(v) for v in ticks])
        _log2(axis, _size)
        axis.set(title=_pairs(pairs), xlabel="vocabulary entries (k: 1024)")
    axes[0].set_ylabel(f"peak memory above the inputs\n({LOWER})")
    handles["the gradients alone: the lower bound"] = _key(pictures.BLACK, linestyle=":")
    handles["solid: measured in one run"] = _key(pictures.BLACK, marker="o", linestyle="")
    if any(row["method"] == "fake" for row in rows):
        hollow = _key(pictures.BLACK, marker="o", linestyle="", **HOLLOW)
        handles["hollow: counted over fake tensors"] = hollow
    first = rows[0]
    drawn.suptitle(
        f"Peak memory of loss and backward: temporaries and gradients\n{first['tokens']} tokens,"
        f" hidden size {first['student_width']} (student) and {first['teacher_width']} (teacher),"
        f" {first['dtype']}, {first['device']}"
    )
    _legend(drawn, handles, 2)
    return drawn


# Maps each sweep to its CSV column, the label of its axis, and the text of a value.
SPEED_AXES: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "tokens": ("tokens", "tokens", lambda text: f"{int(text):,} tokens"),
    "vocab": ("vocab_entries", "vocabulary entries", lambda text: f"{int(text):,} entries"),
    "pairs": ("pairs", "lens pairs", _pairs),
    "mask": (
        "masked",
        "share of tokens masked",
        lambda text: f"{float(text):.0%} masked" if float(text) else "none masked",
    ),
}


@figure
def speed_vs_peers(rows: Rows) -> Any:
    """Draw the time of each sweep, the ratio to the GEMMs alone, and temporary memory."""
    rows = [row for row in rows if row["median_ms"] or row["temporaries_mib"]]
    in_sweep = {name: [r for r in rows if name in r["sweeps"].split()] for name in SPEED_AXES}
    panels: list[tuple[Callable[[Any, Rows], None], Rows]] = [
        (functools.partial(_lines, sweep=name), own) for name, own in in_sweep.items()
    ]
    panels.append((_model_bars, [row for row in rows if row["sweeps"] == "models"]))
    panels.append((_temporaries, [row for row in rows if row["temporaries_mib"]]))
    panels = [(draw, own) for draw, own in panels if own]
    columns = min(3, len(panels)) or 1
    lines = -(-len(panels) // columns) or 1
    drawn = pictures.canvas(4.5 * columns, 3.4 * lines + 1.3)
    axes = [*drawn.subplots(lines, columns, squeeze=False).flat]
    for axis, (draw, own) in zip(axes, panels, strict=False):
        draw(axis, own)
    for axis in axes[len(panels) :]:
        axis.remove()
    labels = {row["contender"]: row["label"] for row in rows}
    handles: dict[str, Any] = {}
    for key in (key for key in STYLES if key in labels):
        dashes = "--" if key == "floor" else "-"
        handles[labels[key]] = _key(STYLES[key][0], marker=STYLES[key][1], linestyle=dashes)
    if any(row["memory_method"] == "fake" for row in rows):
        hollow = _key(pictures.BLACK, marker="s", linestyle="", **HOLLOW)
        handles["hollow: counted over fake tensors, not run"] = hollow
    _legend(drawn, handles, 3)
    if timed := [row for own in in_sweep.values() for row in own]:
        rounds = sorted({int(row["rounds"]) for row in timed})
        drawn.suptitle(
            "Loss and backward: median times, and whiskers from the fastest to the slowest, of"
            f" {' or '.join(map(str, rounds))} interleaved rounds\n"
            f"{timed[0]['dtype']}, {timed[0]['device']}, {timed[0]['threads']} threads"
        )
    return drawn


def _lines(axis: Any, rows: Rows, sweep: str) -> None:
    """Draw the time of each contender along a sweep. Markers of the same size are side by side."""
    column, label, _ = SPEED_AXES[sweep]
    places = sorted({float(row[column]) for row in rows})
    contenders = _by(sorted(rows, key=lambda row: [*STYLES].index(row["contender"])), "contender")
    for place, (key, own) in enumerate(contenders.items()):
        x, *times = _numbers(own, column, "median_ms", "min_ms", "max_ms")
        shift = 0.25 * ((place + 0.5) / len(contenders) - 0.5)
        y, low, high = ([ms / 1e3 for ms in each] for each in times)
        spread = [[a - b for a, b in zip(*ends, strict=True)] for ends in ((y, low), (high, y))]
        front = key == "lens_kernels"
        style = {"color": STYLES[key][0], "marker": STYLES[key][1], "zorder": 3 + front}
        style |= {"linewidth": 2.4 if front else 1.3, "elinewidth": 1.0}
        style["linestyle"] = "--" if key == "floor" else "-"
        axis.errorbar([places.index(value) + shift for value in x], y, spread, **style)
    number = "{:.0%}" if column == "masked" else "{:,g}"
    axis.set_xticks(range(len(places)), [number.format(value) for value in places])
    _log2(axis, lambda seconds: f"{seconds:g}")
    constant = {name: {row[name] for row in rows} for name, *_ in SPEED_AXES.values()}
    said = [
        say(*constant[name]) for name, _, say in SPEED_AXES.values() if len(constant[name]) == 1
    ]
    axis.set_title(f"Time by {label}\n{', '.join(said)}")
    axis.set(xlabel=label, ylabel=f"seconds ({LOWER})")


def _model_bars(axis: Any, rows: Rows) -> None:
    """Draw a bar for each contender and pair of models: its time divided by that of the GEMMs."""
    floors = {
        row["model"]: Timing.read(row["times_ms"]) for row in rows if row["contender"] == "floor"
    }
    models, contenders = [*floors], _by(rows, "contender")
    del contenders["floor"]
    width = 0.8 / len(contenders)
    for place, (key, own) in enumerate(contenders.items()):
        shift = (place - (len(contenders) - 1) / 2) * width
        left = [models.index(row["model"]) + shift for row in own]
        middle = [float(row["ratio_to_floor"]) for row in own]
        ratios = [Timing.read(row["times_ms"]).ratios(floors[row["model"]]) for row in own]
        low = [y - min(each) for y, each in zip(middle, ratios, strict=True)]
        high = [max(each) - y for y, each in zip(middle, ratios, strict=True)]
        axis.bar(left, middle, width, color=STYLES[key][0], yerr=(low, high), error_kw={"lw": 1})
    axis.axhline(1, color=pictures.BLACK, linestyle="--")
    names = [MODELS[key].name if key in MODELS else key for key in models]
    axis.set_xticks(range(len(models)), [name.replace(" < ", "\nunder ") for name in names])
    axis.tick_params("x", labelsize=7)
    axis.set_title(f"Time by models\n{int(rows[0]['tokens']):,} tokens, 1 lens pair")
    axis.set(xlabel="student under teacher", ylabel=GEMMS)


def _temporaries(axis: Any, rows: Rows) -> None:
    """Draw the temporary memory of each contender. Hollow markers show counted memory."""
    for place, row in enumerate(rows):
        colour, marker = STYLES[row["contender"]]
        hollow = {} if row["memory_method"] == "measured" else HOLLOW
        mib = float(row["temporaries_mib"])
        axis.plot(place, mib, color=colour, marker=marker, markersize=9, linestyle="", **hollow)
        axis.annotate(f"{mib:,.0f}", (place, mib), (0, 8), textcoords="offset points", ha="center")
    axis.set_xticks([])
    _log2(axis, _size)
    axis.margins(0.15)
    sizes = (say(rows[0][name]) for name, _, say in [*SPEED_AXES.values()][:3])
    axis.set_title(f"Temporary memory, labels in MiB\n{', '.join(sizes)}")
    axis.set_ylabel(f"peak without the gradients\n({LOWER})")


@figure
def active_vocabulary(rows: Rows) -> Any:
    """Draw the time of the lens pairs against the error, with a curve for each student.

    The time is divided by that of the GEMMs alone. The error of a threshold is the larger of the
    errors of hidden states and head. The final hidden states are not drawn, because almost every
    threshold leaves nothing out for them.
    """
    rows = [row for row in rows if row["group"] == "lens" and row["used_share"]]
    runs, curves = [*_by(rows, "run")], {}
    drawn = pictures.canvas(7.2, 5.4)
    axis, handles = drawn.subplots(), {}
    # The axis is linear near 0, to show the exact gradients.
    smallest = min((error for row in rows if (error := _error(row))), default=SMALL_ERROR)
    axis.set_xscale("symlog", linthresh=smallest / 1.5, linscale=0.4)
    for (run, state), own in _by(rows, "run", "state").items():
        curve = sorted((_error(row), float(row["ratio_to_floor"]), row["threshold"]) for row in own)
        before = state == "before"
        style = {"color": STUDENTS[runs.index(run) % len(STUDENTS)], "marker": "os"[before]}
        style["linestyle"] = "--" if before else "-"
        handles[f"{run.replace('_', ' ')}, {state} training"] = _key(**style)
        axis.plot(*[*zip(*curve, strict=True)][:2], **style)
        curves[run, state] = curve
    # Thresholds are written above the slowest curve, where there is space. The first point of a
    # curve is exact, and has no threshold.
    for *point, name in max(curves.values(), key=lambda curve: sum(x[1] for x in curve))[1:]:
        above = {"textcoords": "offset points", "ha": "center", "rotation": 90, "fontsize": 8}
        axis.annotate(name, point, (0, 7), **above)
    axis.axhline(1, color=pictures.BLACK, linestyle=":")
    wanted = {"color": pictures.GREEN, "alpha": 0.13, "linewidth": 0}
    axis.fill_between([-SMALL_ERROR, SMALL_ERROR], WANTED_RATIO, **wanted)
    axis.set(xlabel=f"relative error of the gradients, 2-norm ({LOWER})", ylabel=GEMMS)
    axis.xaxis.set_major_formatter(lambda error, _: f"{error:.0e}" if error else "0 (exact)")
    axis.set_xlim(left=-smallest / 4)
    axis.set_ylim(bottom=0)
    handles["the four GEMMs alone"] = _key(pictures.BLACK, linestyle=":")
    said = f"wanted: error below {SMALL_ERROR:g}, time below {WANTED_RATIO:g}"
    handles[said] = _key(pictures.GREEN, linewidth=8, alpha=0.2)
    _legend(drawn, handles, 2)
    first = rows[0]
    drawn.suptitle(
        f"Time of loss and backward against the error that grad_threshold makes, {first['pairs']}"
        f" lens pairs\n{first['tokens']} tokens, {first['vocab_entries']} entries, hidden size"
        f" {first['student_width']} (student) and {first['teacher_width']} (teacher)\n"
        f"{first['device']}; medians of {first['rounds']} rounds, a label for each threshold"
    )
    return drawn


def _error(row: Row) -> float:
    return max(float(row["hidden_error"]), float(row["head_error"]))


def main() -> None:
    """Draw all figures of benchmarks/figures/ from the committed CSV files."""
    data = environment.DATA / "cpu"
    for draw in (memory_vs_vocab, speed_vs_peers, active_vocabulary):
        name = draw.__name__
        print(draw(data / f"{name}.csv", png=data.parents[1] / "figures" / f"{name}.png"))


if __name__ == "__main__":
    main()
