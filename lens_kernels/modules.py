"""The public functions as ``nn.Module``s, which hold options but no parameters."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor, nn

from lens_kernels.functional import DistillationOutput, distillation_loss, symmetric_lens_loss
from lens_kernels.options import DistillationOptions, LensOptions, LossOptions


class _Loss(nn.Module):
    kind: ClassVar[type[LossOptions]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = [field.name for field in fields(self.kind)]
        for name in options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; options are {', '.join(known)}")
        self.options = vars(self.kind(**options))

    def extra_repr(self) -> str:
        """Return the options as text for ``print``."""
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class SymmetricLensLoss(_Loss):
    """``symmetric_lens_loss`` with fixed options.

    Args:
        **options: All keywords of the function except ``mask``, ``denominator``,
            ``teacher_statistics`` and ``process_group``, which ``forward`` takes.

    Raises:
        TypeError: An option is unknown or has the wrong type.
        ValueError: An option is out of range.
    """

    kind = LensOptions

    def forward(
        self,
        student_hidden: Any,
        teacher_hidden: Any,
        student_head: Any,
        teacher_head: Any,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
        teacher_statistics: Tensor | None = None,
        process_group: Any = None,
    ) -> Tensor:
        """Return the loss. The arguments are those of ``symmetric_lens_loss``."""
        return symmetric_lens_loss(
            student_hidden, teacher_hidden, student_head, teacher_head, mask=mask,
            denominator=denominator, teacher_statistics=teacher_statistics,
            process_group=process_group, **self.options,
        )  # fmt: skip


class DistillationLoss(_Loss):
    """``distillation_loss`` with fixed options.

    ``**options`` are all keywords of the function except tensors, ``denominator`` and
    ``process_group``, which ``forward`` takes.

    Raises:
        TypeError, ValueError: As for ``SymmetricLensLoss``.
    """

    kind = DistillationOptions

    def forward(
        self,
        student_hidden: Any,
        teacher_hidden: Any,
        student_head: Any,
        teacher_head: Any,
        **per_call: Any,
    ) -> DistillationOutput:
        """Return the output of ``distillation_loss``, whose other keywords are ``per_call``."""
        return distillation_loss(
            student_hidden, teacher_hidden, student_head, teacher_head, **per_call, **self.options
        )
