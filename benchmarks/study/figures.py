"""The figures of the study. They are drawn from its CSV alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import statistics
from benchmarks.study.groups import DIVERGENCES, SAID, Group
from benchmarks.support import plot
from lens_kernels import pictures, symmetric_lens_loss

ARMS = (*plot.STUDENTS, pictures.SKY)
LINES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)))
# An axis with large differences in percent is logarithmic beyond ``LINEAR``, and has these ticks.
LINEAR, TICKS = 20, (-90, -50, -20, -10, 0, 10, 20, 50, 100, 200, 400)
VERDICTS = {"lower": pictures.GREEN, "higher": pictures.VERMILION}


@pictures.styled
def forest(group: Group, results: statistics.Results, folder: Path) -> Path | None:
    """Draw a group's KL by steps, and the difference of each objective from its baseline."""
    found = [x for x in statistics.compare(group, results) if x.percent is not None]
    compared = [arm for arm in group.arms if arm.versus]
    if not found or 2 * len(found) < len(compared):  # too few results for a figure
        return None
    drawn = pictures.canvas(14.5, max(3.4, 0.34 * len(found) + 1.6))
    left, right = drawn.subplots(1, 2, width_ratios=[1.25, 1])
    for height, each in enumerate(reversed(found)):
        assert each.percent is not None
        colour = VERDICTS.get(each.percent.verdict, pictures.GREY)
        if each.percent.student_t is not None:
            left.plot(each.percent.student_t, [height] * 2, color=colour, lw=1.2)
        if each.percent.bootstrap is not None:
            left.plot(each.percent.bootstrap, [height] * 2, color=colour, lw=4, alpha=0.5)
        left.plot(each.percent.mean, height, "o", color=colour, ms=5)
    against = [f"{x.arm.label}\nagainst {x.arm.versus}" for x in reversed(found)]
    same = len({x.arm.versus for x in found}) == 1
    left.set_yticks(
        range(len(found)), [x.arm.label for x in reversed(found)] if same else against, fontsize=8
    )
    left.axvline(0, color="black", lw=1)
    said, (low, high) = "thick: 95 % bootstrap over seeds; thin: 95 % Student's t", left.get_xlim()
    if high > 100:  # on a linear axis, such values would hide the small ones
        left.set_xscale("symlog", linthresh=LINEAR, linscale=2)
        ticks = [x for x in TICKS if low < x < high]
        left.set_xticks(ticks, map(str, ticks))
        left.minorticks_off()
        left.set_xlim(low, 1.2 * high)
        said += f"; logarithmic beyond {LINEAR} %"
    left.margins(y=0.5 / len(found) + 0.02)
    to = f" from {found[0].arm.versus}" if same else ""
    _finish(left, f"difference of KL(teacher, student){to}, % (lower is better)", "x")
    left.set_xlabel(said, fontsize=8)
    for number, arm in enumerate(group.arms):
        points = statistics.mean_curve(arm, results, statistics.shared_seeds(group, results))
        if not points:
            continue
        style: dict[str, Any] = {"color": ARMS[number % len(ARMS)], "lw": 1.4}
        style["linestyle"] = LINES[number // len(ARMS)]
        right.plot(*zip(*points, strict=True), label=arm.label, **style)
    pictures.log_axis(right)
    right.set_xlabel("steps")
    # beside the curves, because no corner between them is free in every group
    drawn.legend(*right.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    _finish(right, "KL(teacher, student) on held-out text, nats (lower is better)", "both")
    counts = sorted({len(x.seeds) for x in found})
    means = f"Means of {' to '.join(map(str, counts))} seeds"
    drawn.suptitle(f"{group.question} {'One seed' if counts == [1] else means}")
    return _save(drawn, folder, f"study_{group.name}")


@pictures.styled
def by_depth(
    group: Group, results: statistics.Results, folder: Path, name: str = "study_depth"
) -> Path | None:
    """Draw entropy, divergence and overconfidence of the lens at each depth."""
    panels = {
        "entropy_student": "entropy, nats",
        "kl": "KL(teacher, student): missed mass",
        "reverse_kl": "KL(student, teacher): excess mass",
        "overconfident": "share more confident than the teacher",
    }
    drawn = pictures.canvas(13.5, 3.9)
    handles: dict[str, Any] = {}
    for axis, (metric, label) in zip(drawn.subplots(1, len(panels)), panels.items(), strict=True):
        for number, arm in enumerate(group.arms):
            points = statistics.by_depth(arm, results, group.seeds, metric)
            if not points:
                continue
            colour = ARMS[number % len(ARMS)]
            (handles[arm.label],) = axis.plot(*zip(*points, strict=True), "o-", color=colour, ms=4)
            if metric == "entropy_student":
                other = statistics.by_depth(arm, results, group.seeds, "entropy_teacher")
                style = {"color": "black", "linestyle": ":", "marker": "s", "ms": 4}
                (handles["teacher"],) = axis.plot(*zip(*other, strict=True), **style)
        depths = sorted({int(x) for line in axis.lines for x in line.get_xdata()})
        axis.set_xticks(depths[:: 1 + len(depths) // 10] if len(depths) > 10 else depths)
        axis.set_xlabel("student's block; the last one is the output", fontsize=8)
        _finish(axis, label, "both")
    if not handles:
        return None
    drawn.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return _save(drawn, folder, name)


@pictures.styled
def penalties(folder: Path, teacher: float = 0.2) -> Path:
    """Draw every divergence and its gradient for a vocabulary of two entries.

    The horizontal axis is the student's probability of the first entry.
    """
    q = torch.linspace(0.001, 0.999, 999)
    drawn = pictures.canvas(11, 4)
    left, right = drawn.subplots(1, 2)
    for name, colour in zip(DIVERGENCES, ARMS, strict=True):
        logits = torch.stack([q.log(), (1 - q).log()], 1).requires_grad_(True)
        p = torch.tensor([teacher, 1 - teacher]).log().expand(len(q), 2).contiguous()
        head = torch.eye(2)
        loss = symmetric_lens_loss(
            logits, p, head, head, divergence=name, reduction="none", backend="torch"
        )
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        left.plot(q, loss.detach().flatten(), color=colour, label=SAID[name])
        right.plot(q, gradient[:, 0], color=colour, label=SAID[name])
    for axis, label in ((left, "penalty, nats"), (right, "gradient of the outcome's logit")):
        axis.axvline(teacher, color="black", linestyle=":", lw=1)
        axis.set_xlabel(f"student's probability; the teacher's is {teacher:g} (dotted)")
        _finish(axis, label, "both")
    left.set_ylim(0, 1.5)
    left.legend(fontsize=8)
    return _save(drawn, folder, "study_penalties")


def _finish(axis: Any, title: str, grid: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.grid(visible=True, axis=grid)


def _save(drawn: Any, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pictures.save(drawn, folder / f"{name}.png")
    return folder / f"{name}.svg"


def all_of(selected: Mapping[str, tuple[Group, statistics.Results]], folder: Path) -> list[Path]:
    """Draw every figure for which there are results."""
    paths = [forest(*each, folder) for each in selected.values()]
    paths += [by_depth(*selected["main"], folder), penalties(folder)]
    paths.append(by_depth(*selected["pretrained"], folder, "study_pretrained_depth"))
    return [path for path in paths if path is not None]
