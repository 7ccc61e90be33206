"""What is computed, as plain values: names of divergences and reductions, and one frozen spec."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar


class Divergence(str, Enum):
    """The divergences between teacher ``p`` and student ``q``; formulas in ``divergence.py``."""

    JSD = "jsd"
    JEFFREYS = "jeffreys"
    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    TVD = "tvd"
    HELLINGER = "hellinger"


# Sums of relative entropies, for which one sweep over tiles of the vocabulary is enough.
RELATIVE_ENTROPIES = (Divergence.FORWARD_KL, Divergence.REVERSE_KL, Divergence.JEFFREYS)


class Reduction(str, Enum):
    """How values per lens pair and token become the result."""

    MEAN = "mean"
    SUM = "sum"
    NONE = "none"


# Relative to the root mean square of a chunk's logit gradients, of which no larger part, in the
# 2-norm, can then be left out: half of bfloat16's unit roundoff.
GRAD_THRESHOLDS = {"bf16": 2.0**-9}
ADAPTIVE = "akl"  # of the final hidden states alone: two divergences under a weight per token

# Written out at import: torch.compile of torch 2.8 cannot list the members of an Enum.
NAMES: dict[type[Enum], tuple[str, ...]] = {
    kind: tuple(member.value for member in kind) for kind in (Divergence, Reduction)
}

EnumT = TypeVar("EnumT", bound=Enum)


def parse_name(kind: type[EnumT], name: str, value: object) -> EnumT:
    """Return the member of ``kind`` called ``value``, or raise and list the known names."""
    return kind(_known_name(name, value, NAMES[kind]))


def _known_name(name: str, value: object, known: Sequence[str], or_else: str = "") -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string{or_else}, got {type(value).__name__}")
    if value not in known:
        choice = ", ".join(map(repr, known))
        raise ValueError(f"{name}={str(value)!r} is unknown; choose one of {choice}{or_else}")
    return value


def final_terms(value: object) -> dict[Divergence, tuple[float, float]]:
    """Return the divergences of the final hidden states, each with its weight ``(a, b)``.

    It is ``a + b * head_share`` for each token; the adaptive KL alone makes ``b`` other than 0.
    """
    known = (*NAMES[Divergence], ADAPTIVE)
    argument = "final_divergence"
    if not isinstance(value, Mapping):
        value = {_known_name(argument, value, known, ", or a mapping of names to weights"): 1.0}
    if not value:
        raise ValueError(f"{argument} is an empty mapping: give it a name with a weight above 0")
    terms: dict[Divergence, tuple[float, float]] = {}

    def add(kind: Divergence, constant: float, slope: float) -> None:
        before = terms.get(kind, (0.0, 0.0))
        terms[kind] = (before[0] + constant, before[1] + slope)

    for name, given in value.items():
        _known_name(f"a name in {argument}", name, known)
        weight = check_number(f"{argument}[{str(name)!r}]", given, 0.0, inclusive=True)
        if weight == 0.0:
            continue
        if name == ADAPTIVE:
            add(Divergence.FORWARD_KL, 0.0, weight)
            add(Divergence.REVERSE_KL, weight, -weight)
        else:
            add(Divergence(name), weight, 0.0)
    if not terms:
        raise ValueError(f"{argument}={dict(value)} has no weight above 0: give one to a name")
    return terms


def check_number(
    name: str,
    value: object,
    low: float,
    high: float = float("inf"),
    hint: str = "",
    inclusive: bool = False,
) -> float:
    """Return ``value`` as a float if it is finite and between ``low`` and ``high``, else raise.

    The bounds themselves are allowed only where ``inclusive``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{hint}")
    within = low <= value <= high if inclusive else low < value < high
    if not within or not abs(value) <= sys.float_info.max:
        bounds = f"between {low:g} and {high:g}" if high < float("inf") else f"above {low:g}"
        if inclusive:
            bounds = f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be finite and lie {bounds}, got {value}{hint}")
    return float(value)


def check_kd_ratio(value: object) -> float:
    """Return ``kd_ratio``, the weight of distillation against cross entropy."""
    return check_number("kd_ratio", value, 0.0, 1.0, inclusive=True)


def check_lens_coeff(value: object) -> float:
    """Return ``lens_coeff``, the weight of the lens term."""
    return check_number("lens_coeff", value, 0.0, inclusive=True)


def check_grad_threshold(value: object) -> tuple[float | None, bool]:
    """Return the threshold, and whether it is relative: a number is not, a name is."""
    if value is None:
        return None, False
    if isinstance(value, str):
        return GRAD_THRESHOLDS[_known_name("grad_threshold", value, [*GRAD_THRESHOLDS])], True
    hint = f", or one of {', '.join(map(repr, GRAD_THRESHOLDS))}"
    return check_number("grad_threshold", value, 0.0, hint=hint, inclusive=True), False


def check_beta(value: object) -> float:
    """Return ``beta``, the teacher's weight in the mixture of ``jsd``, if it is in (0, 1)."""
    hint = (
        "; at the endpoints jsd is 0 whatever the models say:"
        " use divergence='forward_kl' or 'reverse_kl' instead"
    )
    return check_number("beta", value, 0.0, 1.0, hint)


@dataclass(frozen=True)
class LossSpec:
    """Everything about a call that is not a tensor, checked.

    ``divergences`` and ``normed`` have one entry per pair of hidden states; ``normed`` says whether
    the head's norm is still to be applied to them.
    """

    divergences: tuple[Divergence, ...]
    normed: tuple[bool, ...]
    beta: float
    temperature: float
    vocab_size: int
    workspace_bytes: int
    grad_threshold: float | None = None
    threshold_is_relative: bool = False
