"""The head share of the adaptive KL (Wu et al. 2024, arXiv 2404.02657), a constant per token.

The head of a teacher's distribution is the longest run of entries, most probable first, that holds
no more than half of the mass, or the first entry alone if that has more: the rule of the paper's
published code, and of DistillLens's. The share is ``gap_head / (gap_head + gap_tail)``, a gap being
``sum |p - q|`` over the part.
"""

from __future__ import annotations

from typing import List, Optional  # noqa: UP035  torch infers the schema from these

import torch
from torch import Tensor

from lens_kernels.backends import matmul
from lens_kernels.lens import LensHead
from lens_kernels.spec import LossSpec

MASS = 0.5  # of the teacher's probability, that the head does not exceed
# Tiles of the size of a model's logits that are alive at the worst moment, the sort, whose indices
# have 8 bytes and which needs as much again.
TILES = 8


def head_share(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: LensHead,
    teacher_head: LensHead,
    mask: Tensor | None,
    operand_dtype: torch.dtype | None,
    compute: torch.dtype,
    spec: LossSpec,
) -> Tensor:
    """Return the share of every row of ``(N, D)`` states read without norm, 0 where masked."""
    with torch.no_grad():
        return _head_share(
            [student_hidden, teacher_hidden],
            list(student_head.tensors().values()),
            list(teacher_head.tensors().values()),
            ",".join(student_head.tensors()),
            ",".join(teacher_head.tensors()),
            student_head.scalars(),
            teacher_head.scalars(),
            mask,
            operand_dtype,
            compute,
            spec.temperature,
            spec.vocab_size,
            spec.workspace_bytes,
        )


# An operator, because the number of rows to compute depends on the mask's values: torch.compile
# would have to break its graph.
@torch.library.custom_op("lens_kernels::head_share", mutates_args=())
def _head_share(
    hidden: List[Tensor],  # noqa: UP006
    student_head: List[Tensor],  # noqa: UP006
    teacher_head: List[Tensor],  # noqa: UP006
    student_names: str,
    teacher_names: str,
    student_scalars: List[float],  # noqa: UP006
    teacher_scalars: List[float],  # noqa: UP006
    mask: Optional[Tensor],  # noqa: UP045
    operand_dtype: Optional[torch.dtype],  # noqa: UP045
    compute: torch.dtype,
    temperature: float,
    vocab_size: int,
    workspace_bytes: int,
) -> Tensor:
    student, teacher = (
        _Model(
            LensHead.from_parts(dict(zip(names.split(","), tensors, strict=True)), scalars),
            vocab_size,
            temperature,
            operand_dtype,
            compute,
        )
        for names, tensors, scalars in (
            (student_names, student_head, student_scalars),
            (teacher_names, teacher_head, teacher_scalars),
        )
    )
    share = hidden[0].new_zeros(hidden[0].shape[0], dtype=compute)
    kept = (
        torch.arange(share.shape[0], device=share.device) if mask is None else mask.nonzero()[:, 0]
    )
    step = max(1, workspace_bytes // (TILES * vocab_size * compute.itemsize))
    for rows in kept.split(step):
        p = teacher.probabilities(hidden[1][rows])
        share[rows] = _share(p, student.probabilities(hidden[0][rows]))
    return share


@_head_share.register_fake
def _(hidden, *others):  # type: ignore[no-untyped-def]
    compute = others[8]
    return hidden[0].new_empty(hidden[0].shape[0], dtype=compute)


class _Model:
    """A head whose weight is ready to be multiplied, rounded as the backends round it."""

    def __init__(
        self,
        head: LensHead,
        vocab_size: int,
        temperature: float,
        operand_dtype: torch.dtype | None,
        compute: torch.dtype,
    ) -> None:
        self.head, self.temperature, self.compute = head.prefix(vocab_size), temperature, compute
        self.factors = matmul.Factors(self.head.weight, operand_dtype, compute)

    def probabilities(self, hidden: Tensor) -> Tensor:
        """Return those of the rows, ``(R, V)``."""
        x, weight = self.factors.rows(hidden), self.factors.weight
        z = x.new_empty(x.shape[0], weight.shape[0], dtype=self.compute)
        matmul.project(x, weight, z)
        logits, _ = self.head.logits(z, self.temperature)
        return logits.softmax(-1)


def _share(p: Tensor, q: Tensor) -> Tensor:
    gap = (p - q).abs()
    p, order = p.sort(stable=True, descending=True)  # entries that tie, in their own order
    gap = gap.gather(-1, order)
    of_head = p.cumsum(-1) <= MASS
    of_head[:, 0] = True
    head, tail = gap.where(of_head, 0).sum(-1), gap.where(~of_head, 0).sum(-1)
    return torch.where(head + tail > 0, head / (head + tail), 0.5)
