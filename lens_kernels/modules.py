"""The operations as modules, which hold options and nothing else."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor, nn

from lens_kernels.functional import DistillationOutput, distillation_loss, symmetric_lens_loss
from lens_kernels.options import DistillationOptions, LensOptions, LossOptions


class _Loss(nn.Module):
    """A function's options, checked, kept and shown."""

    kind: ClassVar[type[LossOptions]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = [field.name for field in fields(self.kind)]
        for name in options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; options are {', '.join(known)}")
        self.options = vars(self.kind(**options))

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class SymmetricLensLoss(_Loss):
    """``symmetric_lens_loss`` with its options fixed: any keyword but mask and denominator."""

    kind = LensOptions

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
    """``distillation_loss`` with its options fixed: any keyword that is not a tensor of a call."""

    kind = DistillationOptions

    def forward(
        self,
        student_hidden: Any,
        teacher_hidden: Any,
        student_head: Any,
        teacher_head: Any,
        **per_call: Any,
    ) -> DistillationOutput:
        """Return the output; ``per_call`` holds the tensors that the function takes by keyword."""
        return distillation_loss(
            student_hidden, teacher_hidden, student_head, teacher_head, **per_call, **self.options
        )
