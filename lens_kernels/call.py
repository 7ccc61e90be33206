"""What crosses from the public functions to a backend, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens_kernels.lens import LensHead
from lens_kernels.spec import LossSpec


@dataclass(frozen=True, eq=False)
class LossCall:
    """A checked call over ``P`` pairs of hidden states of ``N`` tokens.

    The loss is ``sum(row_weight * rows)``. ``rows[i]`` holds the divergence of pair ``i`` for each
    token; with ``labels`` a last row holds the cross entropy of the last pair's student. Where
    ``mask`` is False nothing is computed and ``rows`` is 0. ``needs_grad`` has one flag for each
    student hidden state, then for each of the student head's ``tensors()``.
    """

    student_hidden: list[Tensor]
    teacher_hidden: list[Tensor]
    student_head: LensHead
    teacher_head: LensHead
    mask: Tensor | None
    labels: Tensor | None
    row_weight: Tensor
    operand_dtype: torch.dtype | None
    spec: LossSpec
    needs_grad: list[bool]

    def wanted(self) -> dict[int | str, Tensor]:
        """Return the tensors that need a gradient: by pair, or by name for those of the head."""
        named: list[tuple[int | str, Tensor]] = [*enumerate(self.student_hidden)]
        named += self.student_head.tensors().items()
        return {key: x for (key, x), needed in zip(named, self.needs_grad, strict=True) if needed}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """``rows`` of the call, and the gradients of its loss for the tensors of ``call.wanted()``.

    ``dropped`` is the share of the logits' gradient, in absolute sum, that ``grad_threshold`` left
    out; 0 without one.
    """

    rows: Tensor
    grads: dict[int | str, Tensor]
    dropped: Tensor
