"""The points that ``speed_vs_peers.py`` measures, and who takes part where."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.shapes import MODELS, Job, Model

FLOOR = "floor"
SWEEPS = ("tokens", "vocab", "pairs", "mask", "memory", "models")
COMPILED = ("lens_kernels", "triton", "dense_compiled", "liger", "liger_fused")
SLOW = ("liger_uncompiled", "trl", "published")
ONCE = "dense_kl_div"  # like dense, but slower: at the first point alone
TINY = Model("tiny", 24, 40, 1000)
SHOWN = ("gpt2", "tinyllama", "smollm2", "qwen2.5")


@dataclass(frozen=True)
class Point:
    """One job, the sweeps that it belongs to, and who is left out because it takes too long."""

    sweeps: tuple[str, ...]
    model: str
    job: Job
    left_out: tuple[str, ...] = ()

    def key(self) -> str:
        """Return its name in the CSV."""
        job = self.job
        return f"{self.model} N{job.tokens} V{job.vocab} L{job.pairs} masked {job.masked:g}"


def points(tokens: int, device: torch.device, quick: bool = False) -> list[Point]:
    """Return every point; one that belongs to several sweeps is there once.

    The sweep of the vocabulary takes half of the tokens, those of other models a quarter.
    """
    name, model = ("tiny", TINY) if quick else ("gpt2", MODELS["gpt2"])

    def point(
        sweeps: str,
        *left_out: str,
        tokens: int = tokens,
        vocab: int = model.vocab,
        pairs: int = 1,
        masked: float = 0.0,
    ) -> Point:
        widths = model.student, model.teacher
        job = Job(tokens, vocab, pairs, *widths, device=device, masked=masked)
        return Point(tuple(sweeps.split()), name, job, left_out)

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
    for key, each in {"tiny": TINY}.items() if quick else [(k, MODELS[k]) for k in SHOWN]:
        job = Job(tokens // 4, each.vocab, 1, each.student, each.teacher, device=device)
        plan.append(Point(("models",), key, job, ("dense_compiled", *SLOW)))
    large = 4 * TINY.vocab if quick else 131072
    plan.append(point("memory", tokens=2 * tokens, vocab=large, pairs=5))
    return plan[:1] + [replace(each, left_out=(*each.left_out, ONCE)) for each in plan[1:]]


def takes_part(key: str, number: int) -> bool:
    """Say whether a contender has a turn in a round; 0 is the one before the timed ones."""
    if number == 0:
        return key in COMPILED
    return key not in SLOW or number % 2 == 1
