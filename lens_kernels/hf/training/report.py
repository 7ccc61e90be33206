"""Figures and tables of a distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TICKS = [digit * 10.0**power for power in range(-6, 4) for digit in (1, 2, 5)]
BEFORE, AFTER = "#9aa5b1", "#1f6f8b"


def depth_figure(
    path: Path,
    before: Mapping[str, float],
    after: Mapping[str, float],
    student_layers: Sequence[int],
    teacher_layers: Sequence[int],
    divergence: str,
) -> None:
    """Draw the divergence of each lens pair before and after training."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    positions = range(len(student_layers))
    width = 0.38
    for shift, values, colour, label in (
        (-width / 2, before, BEFORE, "before training"),
        (width / 2, after, AFTER, "after training"),
    ):
        heights = [values[f"lens_{i}"] for i in student_layers]
        bars = axes.bar([x + shift for x in positions], heights, width, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
    names = [f"{s} | {t}" for s, t in zip(student_layers, teacher_layers, strict=True)]
    axes.set_xticks(list(positions), names)
    axes.set_xlabel("lens pair: student block | teacher block")
    axes.set_ylabel(f"{divergence}, nats per token")
    axes.set_title("Divergence of student and teacher by depth, held-out text")
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    _finish(plt, figure, axes, path)


def loss_figure(path: Path, history: Sequence[Mapping[str, Any]], final_divergence: str) -> None:
    """Draw the loss and its two terms at each training step."""
    plt = _pyplot()
    steps = [entry for entry in history if "loss" in entry and "kd" in entry]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for key, label, colour in (
        ("loss", "loss", "#222222"),
        ("kd", f"final {final_divergence}", AFTER),
        ("lens", "mean over lens pairs", "#c8553d"),
    ):
        points = [(entry["step"], entry[key]) for entry in steps if key in entry]
        axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.6)
    if axes.dataLim.minposy < math.inf:  # all losses are 0 if the student equals its teacher
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_yticks([y for y in TICKS if low <= y <= high], minor=False)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("nats per token")
    axes.set_title("Training loss")
    axes.grid(axis="y", which="both", color="#e4e7eb", linewidth=0.6)
    axes.legend(frameon=False)
    _finish(plt, figure, axes, path)


def table(rows: Sequence[tuple[str, float, float]]) -> str:
    """Return a text table of name, value before and value after."""
    heading = "held-out text, nats per token"
    width = max(len(heading), *(len(name) for name, _, _ in rows))
    lines = [f"{heading:<{width}}   {'before':>8}   {'after':>8}"]
    lines.append("-" * len(lines[0]))
    lines += [f"{name:<{width}}   {old:8.4f}   {new:8.4f}" for name, old, new in rows]
    return "\n".join(lines)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(plt: Any, figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)
    plt.close(figure)
