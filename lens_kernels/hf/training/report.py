"""Figures and tables of a distillation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_kernels import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIR = re.compile(r"lens_\d+")
# An axis is logarithmic if its largest value is more than 5 times its smallest value.
WIDE = 5
# Lines with at most 20 points get markers.
FEW = 20
HELD = {"marker": "D", **pictures.HOLLOW}
BEFORE, AFTER = pictures.LIGHT_GREY, pictures.BLUE


@pictures.styled
def depth_figure(
    path: Path,
    before: Mapping[str, float],
    after: Mapping[str, float],
    student_layers: Sequence[int],
    teacher_layers: Sequence[int],
    divergence: str,
) -> None:
    """Draw the divergence of each lens pair before and after training."""
    figure = pictures.canvas(6.4, 3.8)
    axes = figure.subplots()
    positions = range(len(student_layers))
    width = 0.38
    for shift, values, colour, label in (
        (-width / 2, before, BEFORE, "before training"),
        (width / 2, after, AFTER, "after training"),
    ):
        heights = [values[f"lens_{i}"] for i in student_layers]
        bars = axes.bar([x + shift for x in positions], heights, width, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3f", padding=2)
    names = [f"{s} and {t}" for s, t in zip(student_layers, teacher_layers, strict=True)]
    axes.set_xticks(list(positions), names)
    axes.set_xlabel("lens pair: block of the student and block of the teacher")
    axes.set_ylabel(f"{divergence}, nats per token ({pictures.LOWER})")
    axes.set_title("Divergence of student and teacher by depth, held-out text, one run")
    axes.margins(y=0.15)
    axes.legend()
    pictures.save(figure, path)


@pictures.styled
def loss_figure(path: Path, history: Sequence[Mapping[str, float]], final_divergence: str) -> None:
    """Draw the loss, its terms and the lens pairs against the step, in training and evaluation.

    Terms that were not logged are left out. The lens pairs have their own panel. Without logs of a
    loss, no picture is written.
    """
    if not any("loss" in entry for entry in history):
        return
    pairs = sorted({k for entry in history for k in entry if PAIR.fullmatch(k)}, key=_depth)
    depths = [_depth(name) for name in pairs]
    shades = pictures.shades(len(pairs))
    panels = [
        [
            ("loss", "loss", pictures.BLACK),
            ("ce", "cross entropy", pictures.GREEN),
            ("kd", f"final {final_divergence}", AFTER),
            ("lens", "mean over lens pairs", pictures.VERMILION),
            ("mse", "MSE (no unit)", pictures.PURPLE),
        ],
        [(x, f"block {d}", c) for x, d, c in zip(pairs, depths, shades, strict=True)],
    ]
    titles = ("Loss and its terms", "Lens pairs, by block of the student")
    shown = 2 if pairs else 1
    figure = pictures.canvas(5.2 * shown, 4.2)
    for axes, lines, title in zip(
        figure.subplots(1, shown, squeeze=False)[0], panels, titles, strict=False
    ):
        for key, label, colour in lines:
            _line(axes, history, key, "loss", color=colour, label=label)
            _line(axes, history, f"eval_{key}", "eval_loss", color=colour, linestyle="none", **HELD)
        if any("eval_loss" in entry for entry in history):
            axes.plot([], [], color=pictures.GREY, linestyle="none", label="evaluation", **HELD)
        _log_scale(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(f"nats per token ({pictures.LOWER})")
        axes.set_title(title)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    pictures.save(figure, path)


def _line(
    axes: Axes, history: Sequence[Mapping[str, float]], key: str, having: str, **style: Any
) -> None:
    """Draw a line of the logs. Short lines get markers, because a single point has no line."""
    points = [(x["step"], x[key]) for x in history if key in x and having in x]
    if points:
        if len(points) <= FEW and "marker" not in style:
            style["marker"] = "o"
        axes.plot(*zip(*points, strict=True), **style)


def _log_scale(axes: Axes) -> None:
    # A logarithmic axis needs positive values, but all losses are 0 if the student equals its
    # teacher. For nearly equal values, it would also have too few ticks.
    if axes.dataLim.ymax > WIDE * axes.dataLim.minposy:
        pictures.log_axis(axes)


def _depth(name: str) -> int:
    return int(name.rpartition("_")[2])


def table(rows: Sequence[tuple[str, float, float]]) -> str:
    """Return a text table with a row for each score: its name, and its values before and after."""
    heading = "held-out text, nats per token"
    width = max(len(heading), *(len(name) for name, _, _ in rows))
    lines = [f"{heading:<{width}}   {'before':>8}   {'after':>8}"]
    lines.append("-" * len(lines[0]))
    lines += [f"{name:<{width}}   {old:8.4f}   {new:8.4f}" for name, old, new in rows]
    return "\n".join(lines)
