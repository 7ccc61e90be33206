"""The floor: the GEMMs that every contender needs."""

from __future__ import annotations

import torch

from benchmarks.support.shapes import Inputs
from lens_kernels.backends import matmul

TITLE = "the four GEMMs alone"


def products(inputs: Inputs, backward: bool = True) -> None:
    """Run the four GEMMs of each pair; the student's logits replace their gradient.

    Without ``backward``, run only the two projections.
    """
    head = inputs.student_head.detach()
    for student, teacher in zip(inputs.student_hidden, inputs.teacher_hidden, strict=True):
        x = student.detach()
        logits = x @ head.t()
        teacher @ inputs.teacher_head.t()
        if backward:
            logits @ head
            logits.t() @ x


def tiled_products(inputs: Inputs) -> None:
    """Run the same GEMMs with the functions and the precision of the ``torch`` backend."""
    ours, theirs = (
        matmul.Factors(head.detach(), None, torch.float32)
        for head in (inputs.student_head, inputs.teacher_head)
    )
    d_head = torch.zeros(ours.weight.shape, device=ours.weight.device)
    shape = inputs.student_hidden[0].shape[0], d_head.shape[0]
    tile = torch.empty(shape, device=d_head.device)
    for student, teacher in zip(inputs.student_hidden, inputs.teacher_hidden, strict=True):
        x = ours.rows(student.detach())
        matmul.project(theirs.rows(teacher), theirs.weight, tile)
        matmul.project(x, ours.weight, tile)
        grad = tile.to(x.dtype)
        matmul.product(grad, ours.weight)
        matmul.add_head_gradient(grad, x, d_head, begun=True)
