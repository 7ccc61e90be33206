"""The GEMMs that every implementation needs. Their time is the floor of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.support.shapes import Inputs
from lens_kernels.backends import matmul
from lens_kernels.backends.torch import layout as layouts
from lens_kernels.options import workspace_or_default

TITLE = "the four GEMMs alone"


def products(inputs: Inputs) -> None:
    """Run the four GEMMs of each pair. The logits also serve as their own gradient."""
    head = inputs.student_head.detach()
    for student, teacher in zip(inputs.student_hidden, inputs.teacher_hidden, strict=True):
        x = student.detach()
        logits = x @ head.t()
        teacher @ inputs.teacher_head.t()
        logits @ head
        logits.t() @ x


def tiled_products(inputs: Inputs) -> None:
    """Run the four GEMMs of each pair in the tiles and dtypes of the ``torch`` backend."""
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


def at_layout(inputs: Inputs) -> Iterator[tuple[str, int, int, Callable[[], object]]]:
    """Yield each GEMM of the ``torch`` backend, with as many rows as a tile.

    An item is a name, a number of rows, a number of operations, and a function that runs the GEMM.
    """
    head, hidden = inputs.student_head.detach(), torch.cat(inputs.student_hidden).detach()
    device, (vocab, width) = head.device, head.shape
    ours, theirs = (matmul.Factors(x, None, torch.float32) for x in (head, inputs.teacher_head))
    workspace = workspace_or_default(None, device)
    if layouts.has_row_kernel(device, torch.float32):
        layout = layouts.apart(hidden.shape[0], vocab, ours.dtype, workspace, head.dtype)
    else:
        size = layouts.bytes_per_row(vocab, ours.dtype, torch.float32)
        layout = layouts.in_place(inputs.student_hidden[0].shape[0], size, workspace)
    tile = torch.empty(layout.tile_rows, layouts.row_stride(vocab), device=device)[:, :vocab]
    student = ours.rows(hidden)
    teacher = theirs.rows(torch.cat(inputs.teacher_hidden)[: layout.tile_rows])
    rows = layout.tile_rows
    for name, x, factors in (("student", student[:rows], ours), ("teacher", teacher, theirs)):
        flops = 2 * rows * vocab * x.shape[1]
        run = partial(matmul.project, x, factors.weight, tile)
        yield f"logits of the {name}", rows, flops, run
    rows = layout.grad_rows
    # The operands are random, because a GPU multiplies zeros faster.
    grad = torch.randn(rows, layout.grad_stride or vocab, device=device).to(ours.dtype)[:, :vocab]
    d_head = torch.zeros(vocab, width, device=device)
    flops = 2 * rows * vocab * width
    yield "gradient of hidden states", rows, flops, partial(matmul.product, grad, ours.weight)
    add = partial(matmul.add_head_gradient, grad, student[:rows], d_head, begun=True)
    yield "gradient of the head", rows, flops, add
