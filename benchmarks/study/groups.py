"""The questions of the study. Each is answered by a group of runs, compared with a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.study.settings import (
    PRETRAINED_PAIRS,
    RATE,
    UNIFORM,
    Pairs,
    Run,
    TeacherSettings,
)
from lens_kernels.hf.training.demo import DROPPED

KD, SFT = Run(), Run(final="")
LENS = Run(lens="jsd", pairs=UNIFORM)
RKL = Run(final="reverse_kl")
# The teacher's blocks of a student that is cut from it, and the pairs of its blocks with their
# originals. ``UNIFORM`` pairs them with later blocks of the teacher.
CUT, OWN = (1, 3, 6), ((1, 1), (2, 3))
MAIN_SEEDS, SECOND_SEEDS, SEEDS = (1, 2, 3, 4, 5), (6, 7, 8, 9, 10), (1, 2, 3)
THIRD_SEEDS = tuple(range(11, 21))
SAID = {
    "": "cross entropy",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jsd": "JSD",
    "akl": "adaptive KL",
    "jeffreys": "Jeffreys",
    "tvd": "total variation",
    "hellinger": "Hellinger",
}
DIVERGENCES = ("jsd", "forward_kl", "reverse_kl", "jeffreys", "tvd", "hellinger")


@dataclass(frozen=True)
class Arm:
    """An objective of a group, with its label and the label of its baseline.

    ``run`` has the settings. Each seed of the group replaces the seed of ``run``.
    """

    label: str
    run: Run
    versus: str | None = None


@dataclass(frozen=True)
class Group:
    """A question, and the objectives (arms) and seeds that answer it."""

    name: str
    question: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = SEEDS

    def runs(self, seeds: tuple[int, ...] | None = None) -> Iterator[Run]:
        """Return all runs by seed, so that comparisons are possible after the first seed."""
        for seed in seeds or self.seeds:
            for arm in self.arms:
                yield replace(arm.run, seed=seed)


def with_and_without(label: str, run: Run, pairs: Pairs = UNIFORM) -> tuple[Arm, Arm]:
    """Return a baseline without a lens, and the same objective with a JSD lens."""
    return Arm(label, run), Arm(f"{label} + lens", replace(run, lens="jsd", pairs=pairs), label)


def _main(name: str, question: str, seeds: tuple[int, ...], count: int | None = None) -> Group:
    """Return the objectives of the main comparison, or only the first ``count`` of them."""
    fkl_lens = replace(LENS, lens="forward_kl")
    arms = (
        Arm("forward KL", KD),
        Arm("forward KL + JSD lens", LENS, "forward KL"),
        Arm("forward KL + forward-KL lens", fkl_lens, "forward KL"),
        Arm("reverse KL", RKL, "forward KL"),
        Arm("reverse KL + JSD lens", replace(LENS, final="reverse_kl"), "reverse KL"),
        Arm("cross entropy", SFT, "forward KL"),
    )
    return Group(name, question, arms[:count], seeds)


def _rate(name: str, question: str, run: Run, seed: int) -> Group:
    rates = (RATE / 2, RATE, 2 * RATE)
    chosen = f"{RATE:g}"
    arms = [Arm(f"{x:g}", replace(run, rate=x), None if x == RATE else chosen) for x in rates]
    return Group(name, question, tuple(arms), (seed,))


def _lens() -> Group:
    arms = [Arm("no lens", KD)]
    for name in DIVERGENCES:
        arms.append(Arm(f"{SAID[name]} lens", replace(LENS, lens=name), "no lens"))
    arms.append(Arm("JSD lens, no norm", replace(LENS, norm=False), "no lens"))
    arms.append(Arm("JSD lens, standardised", replace(LENS, standardize=True), "no lens"))
    for weight in (0.1, 1.0):
        run = Run(mse=weight, pairs=UNIFORM)
        arms.append(Arm(f"MSE of hidden states, weight {weight:g}", run, "no lens"))
    question = "Which divergence of the lens, beside forward KL at the output?"
    return Group("lens", question, tuple(arms))


def _output() -> Group:
    arms: list[Arm] = []
    for name in ("forward_kl", "reverse_kl", "jsd", "akl", "jeffreys", "hellinger"):
        arms += with_and_without(SAID[name], Run(final=name))
    question = "Which divergence at the output, with no lens and with a JSD lens?"
    return Group("output", question, tuple(arms))


def _grid() -> Group:
    arms = []
    for final in ("reverse_kl", "jsd", "akl", ""):
        base = Arm(SAID[final], Run(final=final))
        arms.append(base)
        for lens in DIVERGENCES:
            run = replace(LENS, final=final, lens=lens)
            arms.append(Arm(f"{SAID[final]} + {SAID[lens]} lens", run, base.label))
    return Group("grid", "Every lens beside other divergences at the output?", tuple(arms))


def _coefficient() -> Group:
    arms = [Arm("no lens", KD)]
    for coeff in (0.3, 1.0, 3.0, 10.0):
        arms.append(Arm(f"coefficient {coeff:g}", replace(LENS, coeff=coeff), "no lens"))
    for decay, said in (("linear", "linear to 0"), ("first half", "0 after half the steps")):
        for coeff in (1.0, 3.0):
            run = replace(LENS, coeff=coeff, decay=decay)
            arms.append(Arm(f"coefficient {coeff:g}, {said}", run, "no lens"))
    # Where models almost agree, JSD is a quarter of KL: a weight of 0.3 is close to JSD's 1.
    for coeff in (0.3, 1.0, 3.0):
        run = replace(LENS, lens="forward_kl", coeff=coeff)
        arms.append(Arm(f"forward-KL lens, coefficient {coeff:g}", run, "no lens"))
    return Group("coefficient", "How heavy, and for how long?", tuple(arms))


def _pairs() -> Group:
    deep = Run(depth=6)
    choices: dict[str, Pairs] = {
        "1 pair, uniform": ((3, 3),),
        "2 pairs, uniform": ((2, 2), (4, 4)),
        "4 pairs, uniform": ((1, 1), (2, 2), (4, 4), (5, 5)),
        "all 5 pairs": tuple((i, i) for i in range(1, 6)),
        "2 pairs, early": ((1, 1), (2, 2)),
        "2 pairs, late": ((4, 4), (5, 5)),
        "2 pairs, teacher early": ((2, 1), (4, 2)),
        "2 pairs, teacher late": ((2, 4), (4, 5)),
    }
    arms = [Arm("no lens", deep)]
    arms += [Arm(k, replace(deep, lens="jsd", pairs=v), "no lens") for k, v in choices.items()]
    question = "How many pairs and which, for a student of 6 blocks?"
    return Group("pairs", question, tuple(arms))


def _students() -> Group:
    arms: list[Arm] = []
    for depth, pairs in ((2, ((1, 3),)), (3, UNIFORM), (6, ((2, 2), (4, 4)))):
        arms += with_and_without(f"{depth} blocks x 64", Run(depth=depth), pairs)
    for width in (32, 128):
        arms += with_and_without(f"3 blocks x {width}", Run(width=width))
    return Group("students", "Which students gain?", tuple(arms))


def _blocks() -> Group:
    arms: list[Arm] = []
    for rate in (RATE / 4, RATE):
        run = Run(width=128, blocks=CUT, rate=rate)
        arms += with_and_without(f"teacher's blocks, rate {rate:g}", run)
    return Group("blocks", "Does a student cut from the teacher gain?", tuple(arms))


def _own() -> Group:
    base = Run(width=128, blocks=CUT, rate=RATE / 4)
    arms = [Arm("no lens", base)]
    for lens in ("jsd", "forward_kl"):
        for said, pairs in (("spread evenly", UNIFORM), ("own blocks", OWN)):
            run = replace(base, lens=lens, pairs=pairs)
            arms.append(Arm(f"{SAID[lens]} lens, {said}", run, "no lens"))
    question = "Which pairs for a student cut from the teacher?"
    return Group("own", question, tuple(arms))


def _length() -> Group:
    arms: list[Arm] = []
    for steps in (600, 1200, 2400):
        arms += with_and_without(f"{steps} steps", Run(steps=steps))
    return Group("length", "Does the gain last?", tuple(arms))


def _short() -> Group:
    arms: list[Arm] = []
    for steps in (150, 300, 600):
        # With a warm-up of a twelfth, the short trainings ended far above the first steps of 600.
        run = Run(steps=steps, warmup=50 if steps < 600 else 0)
        arms += with_and_without(f"{steps} steps", run)
    return Group("short", "Do short trainings gain?", tuple(arms))


def _teacher() -> Group:
    arms: list[Arm] = []
    for said, teacher in (
        ("another seed", TeacherSettings(seed=1)),
        ("500 steps", TeacherSettings(steps=500)),
    ):
        arms += with_and_without(f"teacher of {said}", Run(teacher=teacher))
    return Group("teacher", "Does it depend on the teacher?", tuple(arms))


def _pretrained() -> Group:
    student = Run(
        # The blocks of the demo's student: 20 of 30.
        blocks=tuple(i for i in range(1, 31) if i not in DROPPED),
        depth=20,
        width=576,
        rate=4e-4,
        steps=120,
        batch=4,
        teacher=TeacherSettings(pretrained=True),
    )
    arms = [Arm("forward KL", student)]
    for name in ("jsd", "forward_kl"):
        run = replace(student, lens=name, pairs=PRETRAINED_PAIRS)
        arms.append(Arm(f"forward KL + {SAID[name]} lens", run, "forward KL"))
    question = "Does SmolLM2-135M, cut to 20 of its 30 blocks, gain?"
    return Group("pretrained", question, tuple(arms))


# All groups, the most important first.
GROUPS = {
    group.name: group
    for group in (
        _rate("rate", "Which learning rate is best for the baseline?", KD, 0),
        _main("main", "Does the lens help?", MAIN_SEEDS),
        _blocks(),
        _pretrained(),
        _lens(),
        _length(),
        _main("second", "Do other seeds say the same?", SECOND_SEEDS),
        _main("ten", "Does the lens help, over all ten seeds?", (*MAIN_SEEDS, *SECOND_SEEDS)),
        _main("third", "Do ten new seeds say the same of the JSD lens?", THIRD_SEEDS, 2),
        _coefficient(),
        _output(),
        _students(),
        _pairs(),
        _teacher(),
        _rate("rate_lens", "Is another learning rate better with the lens?", LENS, 1),
        _rate("rate_reverse", "Is another learning rate better for reverse KL?", RKL, 1),
        _short(),
        _grid(),
        _own(),
    )
}


def quick() -> Group:
    """Return a small group for tests, which takes minutes and needs no network.

    The student is cut from the teacher and trained for a few steps with a large lens weight,
    because the effect of the lens is large with these settings.
    """
    student: dict[str, Any] = {"blocks": CUT, "width": 128, "rate": 1e-3, "steps": 20}
    plain = student | {"teacher": TeacherSettings(text="topics", steps=400)}
    arms = (
        Arm("forward KL", replace(KD, **plain)),
        Arm("forward KL + JSD lens", replace(LENS, coeff=4.0, **plain), "forward KL"),
        Arm("cross entropy", replace(SFT, **plain), "forward KL"),
    )
    return Group("quick", "Does the lens do anything?", arms, (1,))
