"""The floor: the matrix products that no contender can do without."""

from __future__ import annotations

import torch

from benchmarks.support.shapes import Inputs
from lens_kernels.backends import matmul

TITLE = "the four products alone"


def products(inputs: Inputs, backward: bool = True) -> None:
    """Make the four products of each pair; the student's logits stand in for their gradient.

    Without ``backward`` only the first two.
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
    """Do the same with the functions and the precision of the ``torch`` backend."""
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
        matmul.add_head_gradient(grad, x, d_head)
