"""The picture of docs/method.md: how each divergence penalises a student's mistakes.

python benchmarks/dual_penalty.py    draws benchmarks/figures/dual_penalty.png and .svg

All values come from the library's own divergences in float64; nothing is trained or timed. Each
divergence is scaled so that all curves agree for a student that is almost right.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:
    import checkout  # noqa: F401

from lens_kernels import pictures
from lens_kernels.divergence import pointwise
from lens_kernels.options import Divergence

FIGURES = Path(__file__).parent / "figures"
# Maps each divergence to three values: its scale near p == q relative to a KL divergence, and the
# label and style of its curve.
CURVES: dict[Divergence, tuple[float, str, dict[str, Any]]] = {
    Divergence.FORWARD_KL: (1.0, "KL(teacher, student)", {"color": pictures.BLUE, "ls": "--"}),
    Divergence.REVERSE_KL: (1.0, "KL(student, teacher)", {"color": pictures.ORANGE, "ls": "-."}),
    Divergence.JEFFREYS: (2.0, "Jeffreys / 2", {"color": pictures.GREEN, "ls": ":"}),
    Divergence.JSD: (0.25, "4 JSD", {"color": pictures.VERMILION, "lw": 2.4}),
}
ENTRIES = 1000


def penalty(divergence: Divergence, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """Return each entry's part of a divergence, and the gradient with respect to the logits.

    Both are divided by the divergence's scale in ``CURVES``.
    """
    p, q = lp.exp(), lq.exp()
    f, h = pointwise(divergence, 0.5)(lp, lq, p, q, (0.5, 0.5))
    coefficient = CURVES[divergence][0]
    return f / coefficient, (h - q * h.sum(-1, keepdim=True)) / coefficient


def entry(divergence: Divergence, log_ratio: Tensor) -> Tensor:
    """Return the penalty of one entry for each ``log(q / p)``, divided by the larger of p and q."""
    p, q = -log_ratio.clamp(min=0), log_ratio.clamp(max=0)
    return penalty(divergence, p, q)[0]


def confidence(divergence: Divergence, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient's 2-norm for students that are too sure or too unsure.

    Their logits are ``sharpness`` times the teacher's logits. The teacher's probabilities are
    proportional to ``1 / rank^2`` over ``ENTRIES`` entries.
    """
    teacher = -2 * torch.arange(1, ENTRIES + 1, dtype=torch.float64).log()
    lq = torch.log_softmax(sharpness[:, None] * teacher, -1)
    f, gradient = penalty(divergence, torch.log_softmax(teacher, -1).expand_as(lq), lq)
    return f.sum(-1), gradient.norm(dim=-1)


@pictures.styled
def draw() -> Any:
    """Return a figure with three panels: the penalty of one entry, the loss, and its gradient."""
    ratio = torch.linspace(-6, 6, 241, dtype=torch.float64)
    sharpness = 2 ** torch.linspace(-4, 4, 161, dtype=torch.float64)
    drawn = pictures.canvas(11.0, 4.0)
    one, loss, gradient = drawn.subplots(1, 3)
    for divergence, (_, label, style) in CURVES.items():
        one.plot(ratio, entry(divergence, ratio), label=label, **style)
        values, norms = confidence(divergence, sharpness)
        loss.plot(sharpness, values, **style)
        gradient.plot(sharpness, norms, **style)
    one.set_title("One entry of the vocabulary")
    one.set(xlabel="log(student / teacher)", ylabel="penalty / larger probability", ylim=(0, 3.2))
    _sides(one, -3, 3, "student's probability\ntoo small", "student's probability\ntoo large")
    loss.set(title="A student that is too unsure or too sure", ylabel="loss, nats", ylim=(0, 5))
    gradient.set(title="Gradient with respect to its logits", ylabel="2-norm", ylim=(0, 1.0))
    for axis in (loss, gradient):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("student's logits / teacher's logits")
        _sides(axis, 0.25, 4, "too unsure", "too sure")
    drawn.legend(loc="outside lower center", ncols=len(CURVES))
    drawn.suptitle(
        "Each KL is weak on one side of an entry; symmetric divergences treat both alike"
    )
    return drawn


def _sides(axis: Any, left: float, right: float, *texts: str) -> None:
    place = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "top"}
    for x, text in zip((left, right), texts, strict=True):
        axis.text(x, 0.98, text, **place, bbox={"facecolor": "white", "edgecolor": "none"})


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description="Draw the picture of docs/method.md.")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the picture")
    figure = parser.parse_args().out / "dual_penalty.png"
    pictures.save(draw(), figure)
    print(figure)


if __name__ == "__main__":
    main()
