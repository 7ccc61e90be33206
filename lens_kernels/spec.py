"""What is computed, as plain values: names of divergences and reductions, and one frozen spec."""

from __future__ import annotations

import sys
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


class Reduction(str, Enum):
    """How values per lens pair and token become the result."""

    MEAN = "mean"
    SUM = "sum"
    NONE = "none"


EnumT = TypeVar("EnumT", bound=Enum)


def parse_name(kind: type[EnumT], name: str, value: object) -> EnumT:
    """Return the member of ``kind`` called ``value``, or raise and list the known names."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    for member in kind:
        if value == member.value:
            return member
    known = ", ".join(repr(member.value) for member in kind)
    raise ValueError(f"{name}={str(value)!r} is unknown; choose one of {known}")


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
