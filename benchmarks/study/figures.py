"""The pictures of the study, each as SVG and PNG, drawn from its results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.study import statistics
from benchmarks.study.groups import DIVERGENCES, GROUPS, SAID, Group
from benchmarks.support.plot import GREY, STUDENTS
from lens_kernels import symmetric_lens_loss

VERDICTS = {"lower": "#009E73", "higher": "#D55E00"}
GREYISH = "#555555"


def forest(group: Group, results: statistics.Results, folder: Path) -> Path | None:
    """Draw the differences of a group from their baselines, and KL by steps."""
    found = [x for x in statistics.compare(group, results) if x.percent is not None]
    if not found:
        return None
    drawn = _canvas(12.5, max(3.4, 0.34 * len(found) + 1.6))
    left, right = drawn.subplots(1, 2, width_ratios=[1.25, 1])
    for height, each in enumerate(reversed(found)):
        assert each.percent is not None
        colour = VERDICTS.get(each.percent.verdict, GREYISH)
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
    left.margins(y=0.5 / len(found) + 0.02)
    to = f" from {found[0].arm.versus}" if same else ""
    _finish(left, f"difference of KL(teacher, student){to}, %", "x")
    left.set_xlabel("thick: 95 % bootstrap over seeds; thin: 95 % Student's t", fontsize=8)
    for number, arm in enumerate(group.arms):
        points = statistics.mean_curve(arm, results, group.seeds)
        if not points:
            continue
        style = {"color": STUDENTS[number % len(STUDENTS)], "lw": 1.4}
        style["linestyle"] = ("-", "--", ":")[number // len(STUDENTS) % 3]
        right.plot(*zip(*points, strict=True), label=arm.label, **style)
    right.set_yscale("log")
    for axis in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        axis("{x:g}")
    right.set_xlabel("steps")
    right.legend(fontsize=6.5, frameon=False)
    _finish(right, "KL(teacher, student) on held-out text, mean of the seeds", "both")
    drawn.suptitle(group.question)
    return _save(drawn, folder, f"study_{group.name}")


def by_depth(group: Group, results: statistics.Results, folder: Path) -> Path | None:
    """Draw entropy, divergence and overconfidence of the lenses by depth."""
    panels = {
        "entropy_student": "entropy, nats",
        "kl": "KL(teacher, student): missed mass",
        "reverse_kl": "KL(student, teacher): excess mass",
        "overconfident": "share more confident than the teacher",
    }
    drawn = _canvas(13.5, 3.9)
    handles: dict[str, Any] = {}
    for axis, (metric, label) in zip(drawn.subplots(1, len(panels)), panels.items(), strict=True):
        for number, arm in enumerate(group.arms):
            points = statistics.by_depth(arm, results, group.seeds, metric)
            if not points:
                continue
            colour = STUDENTS[number % len(STUDENTS)]
            (handles[arm.label],) = axis.plot(*zip(*points, strict=True), "o-", color=colour, ms=4)
            if metric == "entropy_student":
                other = statistics.by_depth(arm, results, group.seeds, "entropy_teacher")
                style = {"color": "black", "linestyle": ":", "marker": "s", "ms": 4}
                (handles["teacher"],) = axis.plot(*zip(*other, strict=True), **style)
        axis.set_xticks(sorted({int(x) for line in axis.lines for x in line.get_xdata()}))
        axis.set_xlabel("student's block; the last one is the output", fontsize=8)
        _finish(axis, label, "both")
    if not handles:
        return None
    drawn.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    return _save(drawn, folder, "study_depth")


def penalties(folder: Path, teacher: float = 0.2) -> Path:
    """Draw what each divergence asks of a student's probability of one of two outcomes."""
    q = torch.linspace(0.001, 0.999, 999)
    drawn = _canvas(11, 4)
    left, right = drawn.subplots(1, 2)
    for name, colour in zip(DIVERGENCES, STUDENTS, strict=True):
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
    left.legend(fontsize=8, frameon=False)
    return _save(drawn, folder, "study_penalties")


def _canvas(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _finish(axis: Any, title: str, grid: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.grid(axis=grid, **GREY)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _save(drawn: Any, folder: Path, name: str) -> Path:
    """Write both files, the same ones for the same results, and return the SVG's path."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "lens_study"}):
        drawn.savefig(folder / f"{name}.svg", metadata={"Date": None})
    drawn.savefig(folder / f"{name}.png")
    return folder / f"{name}.svg"


def all_of(results: statistics.Results, folder: Path) -> list[Path]:
    """Draw everything that there are results for."""
    paths = [forest(group, results, folder) for group in GROUPS.values()]
    paths += [by_depth(GROUPS["main"], results, folder), penalties(folder)]
    return [path for path in paths if path is not None]
