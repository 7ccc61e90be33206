"""The settings that decide the result of a run. A hash of the settings is the key of the run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

Pairs = tuple[tuple[int, int], ...]

# The best learning rate for forward KL without a lens, found by the group ``rate``.
RATE = 6e-3
# Two evenly spaced lens pairs, for a student of 3 blocks and a teacher of 6.
UNIFORM: Pairs = ((1, 2), (2, 4))
# The same for the pretrained teacher of 30 blocks and its student of 20.
PRETRAINED_PAIRS: Pairs = ((7, 10), (13, 20))

# The settings of a run that have an effect only with a lens.
LENS_OPTIONS = ("coeff", "decay", "norm", "standardize")


@dataclass(frozen=True)
class TeacherSettings:
    """A teacher: its text, and its training by cross entropy.

    Trained teachers have 6 blocks of width 128 and their own tokenizer. With ``pretrained`` the
    teacher is SmolLM2-135M, and ``seed``, ``steps`` and ``rate`` must keep their defaults.
    """

    text: str = "django"
    seed: int = 0
    steps: int = 1500
    rate: float = 3e-3
    pretrained: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that have no effect, because equal runs must have equal keys."""
        kind = TeacherSettings
        trained = (self.seed, self.steps, self.rate) != (kind.seed, kind.steps, kind.rate)
        if self.pretrained and trained:
            raise ValueError("a pretrained teacher is not trained: leave seed, steps and rate out")

    @property
    def key(self) -> str:
        """A unique name for these settings."""
        return _key(self)


@dataclass(frozen=True)
class Run:
    """The settings of a student's training. Runs that differ only in ``seed`` are repetitions.

    An empty ``final`` means cross entropy of the text. An empty ``lens`` means no lens, and
    ``coeff``, ``decay``, ``norm`` and ``standardize`` must then keep their defaults. ``pairs`` are
    (student, teacher) depths. A student starts from the teacher's ``blocks``, or from random
    weights if ``blocks`` is empty. Without ``warmup`` steps, the warm-up is a twelfth of the steps.
    """

    final: str = "forward_kl"
    lens: str = ""
    coeff: float = 1.0
    decay: str = "constant"
    norm: bool = True
    standardize: bool = False
    mse: float = 0.0
    pairs: Pairs = ()
    depth: int = 3
    width: int = 64
    blocks: tuple[int, ...] = ()
    rate: float = RATE
    steps: int = 600
    warmup: int = 0
    batch: int = 16
    teacher: TeacherSettings = TeacherSettings()
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that have no effect, because equal runs must have equal keys."""
        options = [f for f in fields(self) if f.name in LENS_OPTIONS]
        if not self.lens and any(getattr(self, f.name) != f.default for f in options):
            raise ValueError(f"{', '.join(LENS_OPTIONS)} need a lens: set lens, or leave them out")
        if bool(self.lens or self.mse) != bool(self.pairs):
            raise ValueError(f"pairs must be given only with lens or mse, got {self.pairs}")

    @property
    def key(self) -> str:
        """A unique name for these settings."""
        return _key(self)


def _key(settings: Run | TeacherSettings) -> str:
    return hashlib.sha256(json.dumps(_said(settings), sort_keys=True).encode()).hexdigest()[:12]


def _said(settings: Run | TeacherSettings) -> dict[str, Any]:
    # Leave out default values, so that a new setting does not change the keys of old results.
    said: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name == "rate" or value != field.default:
            said[field.name] = _said(value) if isinstance(value, TeacherSettings) else value
    return said
