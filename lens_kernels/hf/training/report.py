"""Figures and tables of a distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lens_kernels import pictures

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
def loss_figure(path: Path, history: Sequence[Mapping[str, Any]], final_divergence: str) -> None:
    """Draw the loss and its two terms at each training step."""
    steps = [entry for entry in history if "loss" in entry and "kd" in entry]
    figure = pictures.canvas(6.4, 3.8)
    axes = figure.subplots()
    for key, label, colour in (
        ("loss", "loss", pictures.BLACK),
        ("kd", f"final {final_divergence}", AFTER),
        ("lens", "mean over lens pairs", pictures.VERMILION),
    ):
        points = [(entry["step"], entry[key]) for entry in steps if key in entry]
        axes.plot(*zip(*points, strict=True), color=colour, label=label)
    # All losses are 0 if the student equals its teacher. A logarithmic axis needs positive values.
    if axes.dataLim.minposy < math.inf:
        pictures.log_axis(axes)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(f"nats per token ({pictures.LOWER})")
    axes.set_title("Training loss and its terms, one run")
    axes.legend()
    pictures.save(figure, path)


def table(rows: Sequence[tuple[str, float, float]]) -> str:
    """Return a text table with a row for each score: its name, and its value before and after."""
    heading = "held-out text, nats per token"
    width = max(len(heading), *(len(name) for name, _, _ in rows))
    lines = [f"{heading:<{width}}   {'before':>8}   {'after':>8}"]
    lines.append("-" * len(lines[0]))
    lines += [f"{name:<{width}}   {old:8.4f}   {new:8.4f}" for name, old, new in rows]
    return "\n".join(lines)
