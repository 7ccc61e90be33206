"""The operations as modules, which hold options and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from lens_kernels.functional import (
    DistillationOutput,
    distillation_loss,
    symmetric_lens_loss,
)
from lens_kernels.spec import (
    Divergence,
    Reduction,
    check_beta,
    check_grad_threshold,
    check_kd_ratio,
    check_lens_coeff,
    check_number,
    final_terms,
    parse_name,
)

# What changes from call to call is an argument of ``forward``; every other keyword is an option.
PER_CALL = {"mask", "denominator", "labels", "student_final", "teacher_final"}


def _options(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``function`` with their defaults, replaced by those given."""
    known = {
        name: parameter.default
        for name, parameter in signature(function).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and name not in PER_CALL
    }
    for name in given:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; options are {', '.join(known)}")
    options = {**known, **given}
    parse_name(Divergence, "divergence", options["divergence"])
    if "final_divergence" in options:
        final_terms(options["final_divergence"])
    if "reduction" in options:
        parse_name(Reduction, "reduction", options["reduction"])
    for name, check in (("kd_ratio", check_kd_ratio), ("lens_coeff", check_lens_coeff)):
        if name in options:
            check(options[name])
    check_beta(options["beta"])
    check_grad_threshold(options["grad_threshold"])
    check_number("temperature", options["temperature"], 0.0)
    return options


class _Loss(nn.Module):
    """A function's options, checked, kept and shown."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = _options(function, options)

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class SymmetricLensLoss(_Loss):
    """``symmetric_lens_loss`` with its options fixed; see there for their meaning."""

    def __init__(self, **options: Any) -> None:
        """Take any keyword of ``symmetric_lens_loss`` but mask and denominator."""
        super().__init__(symmetric_lens_loss, options)

    def forward(
        self,
        student_hidden: Any,
        teacher_hidden: Any,
        student_head: Any,
        teacher_head: Any,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return symmetric_lens_loss(
            student_hidden,
            teacher_hidden,
            student_head,
            teacher_head,
            mask=mask,
            denominator=denominator,
            **self.options,
        )


class DistillationLoss(_Loss):
    """``distillation_loss`` with its options fixed; see there for their meaning."""

    def __init__(self, **options: Any) -> None:
        """Take any keyword of ``distillation_loss`` but the tensors of a call."""
        super().__init__(distillation_loss, options)

    def forward(
        self,
        student_hidden: Any,
        teacher_hidden: Any,
        student_head: Any,
        teacher_head: Any,
        **per_call: Any,
    ) -> DistillationOutput:
        """Return the output; ``per_call`` are the tensors that the function takes by keyword."""
        return distillation_loss(
            student_hidden, teacher_hidden, student_head, teacher_head, **per_call, **self.options
        )
