"""The options of a call. Only this module defines their names, defaults and ranges.

Public functions, modules and the Trainer take their defaults and checks from here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor


class Divergence(str, Enum):
    """The divergences of teacher ``p`` and student ``q``. ``divergence.py`` has the formulas."""

    JSD = "jsd"
    JEFFREYS = "jeffreys"
    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    TVD = "tvd"
    HELLINGER = "hellinger"


# Divergences that are sums of relative entropies (KL). They have no upper bound, and the Triton
# kernels need only one sweep over the vocabulary for them.
RELATIVE_ENTROPIES = (Divergence.FORWARD_KL, Divergence.REVERSE_KL, Divergence.JEFFREYS)
ADAPTIVE = "akl"  # the adaptive KL, which compares only final hidden states


class Reduction(str, Enum):
    """How losses of lens pairs and tokens become one result."""

    MEAN = "mean"
    SUM = "sum"
    NONE = "none"


# Names of thresholds, as multiples of the root mean square of a chunk's logit gradients. The 2-norm
# of the skipped entries is at most the same multiple of the chunk's 2-norm. 2^-9 is half of
# bfloat16's unit roundoff.
GRAD_THRESHOLDS = {"bf16": 2.0**-9}

# List the names now, because torch 2.8 cannot compile an iteration over an Enum.
NAMES: dict[type[Enum], tuple[str, ...]] = {
    kind: tuple(member.value for member in kind) for kind in (Divergence, Reduction)
}

EnumT = TypeVar("EnumT", bound=Enum)


def parse_name(kind: type[EnumT], name: str, value: object) -> EnumT:
    """Return the member of ``kind`` called ``value``.

    If there is none, raise an error that lists all names.
    """
    return kind(_known_name(name, value, NAMES[kind]))


def _known_name(name: str, value: object, known: Sequence[str], or_else: str = "") -> str:
    value = _check_string(name, value, or_else)
    if value not in known:
        choice = ", ".join(map(repr, known))
        raise ValueError(f"{name}={str(value)!r} is unknown; choose one of {choice}{or_else}")
    return value


def _check_string(name: str, value: object, or_else: str = "") -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string{or_else}, got {type(value).__name__}")
    return value


def check_int(name: str, value: object) -> int:
    """Return ``value`` if it is an integer, and raise an error otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return value


def check_count(name: str, value: object) -> int:
    """Return ``value`` if it is a positive integer, and raise an error otherwise."""
    value = check_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_number(
    name: str,
    value: object,
    low: float,
    high: float = float("inf"),
    hint: str = "",
    inclusive: bool = False,
) -> float:
    """Return ``value`` as a float if it is finite and between ``low`` and ``high``.

    Otherwise raise an error. With ``inclusive``, both limits are valid values.
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


def parse_final_divergence(name: str, value: object) -> dict[Divergence, tuple[float, float]]:
    """Return the divergences of the final hidden states, each with two numbers ``(a, b)``.

    ``a + b * head_share`` is the weight of a token. ``head_share`` is the forward KL's weight in
    the adaptive KL, the only divergence whose ``b`` is not 0.
    """
    known = (*NAMES[Divergence], ADAPTIVE)
    if not isinstance(value, Mapping):
        value = {_known_name(name, value, known, ", or a mapping of names to weights"): 1.0}
    if not value:
        raise ValueError(f"{name} is an empty mapping: give it a name with a weight above 0")
    terms: dict[Divergence, tuple[float, float]] = {}

    def add(kind: Divergence, constant: float, slope: float) -> None:
        before = terms.get(kind, (0.0, 0.0))
        terms[kind] = (before[0] + constant, before[1] + slope)

    for term, given in value.items():
        _known_name(f"a name in {name}", term, known)
        weight = check_number(f"{name}[{str(term)!r}]", given, 0.0, inclusive=True)
        if weight == 0.0:
            continue
        if term == ADAPTIVE:
            add(Divergence.FORWARD_KL, 0.0, weight)
            add(Divergence.REVERSE_KL, weight, -weight)
        else:
            add(Divergence(term), weight, 0.0)
    if not terms:
        raise ValueError(f"{name}={dict(value)} has no weight above 0: give one to a name")
    return terms


def parse_grad_threshold(name: str, value: object) -> tuple[float | None, bool]:
    """Return a threshold, and whether it is relative: names are relative, numbers are not."""
    if value is None:
        return None, False
    if isinstance(value, str):
        return GRAD_THRESHOLDS[_known_name(name, value, [*GRAD_THRESHOLDS])], True
    hint = f", or one of {', '.join(map(repr, GRAD_THRESHOLDS))}"
    return check_number(name, value, 0.0, hint=hint, inclusive=True), False


def _check_flag(name: str, value: object, other: str | None = None) -> None:
    if not isinstance(value, bool) and (other is None or value != other):
        choice = "True or False" if other is None else f"True, False or {other!r}"
        raise TypeError(f"{name} must be {choice}, got {value!r}")


def _check_beta(name: str, value: object) -> None:
    hint = (
        "; at the endpoints jsd is 0 for any two models:"
        " use divergence='forward_kl' or 'reverse_kl' instead"
    )
    check_number(name, value, 0.0, 1.0, hint)


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "divergence": lambda name, value: parse_name(Divergence, name, value),
    "final_divergence": parse_final_divergence,
    "beta": _check_beta,
    "temperature": lambda name, value: check_number(name, value, 0.0),
    "teacher_temperature": lambda name, value: value is None or check_number(name, value, 0.0),
    "temperature_squared": _check_flag,
    "standardize": lambda name, value: _check_flag(name, value, "lens"),
    "token_clip": lambda name, value: value is None or check_number(name, value, 0.0),
    "kd_ratio": lambda name, value: check_number(name, value, 0.0, 1.0, inclusive=True),
    "lens_coeff": lambda name, value: check_number(name, value, 0.0, inclusive=True),
    "reduction": lambda name, value: parse_name(Reduction, name, value),
    "backend": _check_string,
    "workspace_bytes": lambda name, value: value is None or check_count(name, value),
    "grad_threshold": parse_grad_threshold,
    "label_smoothing": lambda name, value: check_number(name, value, 0.0, 1.0, inclusive=True),
    "z_loss": lambda name, value: check_number(name, value, 0.0, inclusive=True),
    "ignore_index": check_int,
}


def check_option(option: str, value: object, name: str | None = None) -> None:
    """Raise an error if ``value`` is invalid for ``option``, which the error calls ``name``."""
    CHECKS[option](name or option, value)


@dataclass(frozen=True, eq=False)
class LossOptions:
    """The options that both public functions share. ``symmetric_lens_loss`` documents them.

    ``layer_weights`` and ``vocab_size`` are checked in the call, because they depend on its
    tensors.
    """

    divergence: str = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float | None = None
    temperature_squared: bool = False
    standardize: bool | str = False
    token_clip: float | None = None
    layer_weights: Sequence[float] | Tensor | None = None
    vocab_size: int | None = None
    backend: str = "auto"
    workspace_bytes: int | None = None
    grad_threshold: float | str | None = None

    def __post_init__(self) -> None:
        """Check each option by itself."""
        for field in fields(self):
            if field.name in CHECKS:
                check_option(field.name, getattr(self, field.name))

    @property
    def factor(self) -> float:
        """The number by which divergences are multiplied: the squared temperature, or 1."""
        return self.temperature**2 if self.temperature_squared else 1.0


@dataclass(frozen=True, eq=False)
class LensOptions(LossOptions):
    """The options of ``symmetric_lens_loss``."""

    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Check each option, and refuse options that exclude each other."""
        super().__post_init__()
        if not isinstance(self.standardize, bool):
            raise ValueError(f"standardize must be True or False here, got {self.standardize!r}")
        if self.reduction == Reduction.NONE and self.layer_weights is not None:
            raise ValueError("layer_weights do not apply to reduction='none': leave them out")

    def check_denominator(self, denominator: object) -> None:
        """Raise an error if there is a denominator, but the reduction does not divide."""
        if self.reduction != Reduction.MEAN and denominator is not None:
            reduction = str(Reduction(self.reduction).value)
            raise ValueError(f"denominator needs reduction='mean', got {reduction!r}: leave it out")


@dataclass(frozen=True, eq=False)
class CrossEntropyOptions(LensOptions):
    """The options of ``linear_cross_entropy``. Inherited options of divergences have no effect."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    return_lse: bool = False
    return_entropy: bool = False


@dataclass(frozen=True, eq=False)
class DistillationOptions(LossOptions):
    """The options of ``distillation_loss``."""

    kd_ratio: float = 1.0
    lens_coeff: float = 1.0
    final_divergence: str | Mapping[str, float] = "reverse_kl"


def workspace_or_default(workspace_bytes: int | None, device: torch.device) -> int:
    """Return the maximum bytes of all tiles of logits on a device."""
    if workspace_bytes is not None:
        return workspace_bytes
    # The default on a CPU is enough for 640 rows of a vocabulary of 50k, so that GEMMs run at full
    # speed. The default on a GPU is enough for 1024 rows of a vocabulary of 128k.
    return (256 if device.type == "cpu" else 1024) * 2**20
