"""The points (sets of sizes) that ``speed_vs_peers.py`` measures, and their contenders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.support.shapes import MODELS, Job, Model

FLOOR = "floor"
SWEEPS = ("tokens", "vocab", "pairs", "mask", "memory", "models")
COMPILED = ("lens_kernels", "dense_compiled", "liger")
SLOW = ("liger_uncompiled", "trl", "published")
ONCE = "dense_kl_div"  # a slower variant of dense, so it runs only at the first point
TINY = Model("tiny", 24, 40, 1000)
SHOWN = ("gpt2", "tinyllama", "smollm2", "qwen2.5")


@dataclass(frozen=True)
class Point:
    """One set of sizes, the sweeps that include it, and the contenders that are too slow for it."""

    sweeps: tuple[str, ...]
    model: str
    job: Job
    left_out: tuple[str, ...] = ()

    def key(self) -> str:
        """Return the name of the point in the CSV."""
        job = self.job
        return f"{self.model} N{job.tokens} V{job.vocab} L{job.pairs} masked {job.masked:g}"

    def columns(self) -> dict[str, Any]:
        """Return the point as columns of the CSV."""
        names = {"point": self.key(), "sweeps": " ".join(self.sweeps), "model": self.model}
        return names | self.job.columns()


def points(tokens: int, device: torch.device, quick: bool = False) -> list[Point]:
    """Return all points. If several sweeps contain the same point, it appears once.

    The vocabulary sweep uses half of the tokens, and the models sweep a quarter.
    """
    models = {"tiny": TINY} if quick else {name: MODELS[name] for name in SHOWN}
    first, model = next(iter(models.items()))

    def point(sweeps: str, *left_out: str, tokens: int = tokens, **sizes: Any) -> Point:
        job = model.job(tokens, device=device, **sizes)
        return Point(tuple(sweeps.split()), first, job, left_out)

    few, half = ("dense_compiled", "liger", *SLOW), tokens // 2
    plan = [
        point("tokens mask"),
        point("tokens vocab", "liger_uncompiled", "published", tokens=half),
        point("tokens", *few, tokens=2 * tokens),
        point("vocab", *few, tokens=half, vocab=model.vocab // 2),
        point("vocab", *few, tokens=half, vocab=2 * model.vocab),
        point("mask pairs", "liger_uncompiled", "dense_compiled", masked=0.5),
        point("pairs", "dense", "liger_uncompiled", "trl", *few[:2], pairs=5, masked=0.5),
    ]
    for name, each in models.items():
        job = each.job(tokens // 4, device=device)
        plan.append(Point(("models",), name, job, ("dense_compiled", *SLOW)))
    large = 4 * TINY.vocab if quick else 131072
    plan.append(point("memory", tokens=2 * tokens, vocab=large, pairs=5))
    return plan[:1] + [replace(each, left_out=(*each.left_out, ONCE)) for each in plan[1:]]


def takes_part(key: str, number: int) -> bool:
    """Return whether a contender runs in a round.

    Round 0 only compiles, and is not timed.
    """
    if number == 0:
        return key in COMPILED
    return key not in SLOW or number % 2 == 1
