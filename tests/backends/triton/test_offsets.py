"""Tensors with more than 2^31 elements, whose offsets overflow 32-bit integers.

8192 tokens by 262144 entries are 2^31 logits. The tests only reserve address space, because pages
that are never written take no memory. Another 2^31 elements are reserved before each tensor, so
that an offset that overflows reads zeros instead of crashing.
"""

import mmap

import pytest
import torch
import triton

from lens_kernels import LensHead, LensNorm, symmetric_lens_loss
from lens_kernels.backends.triton.kernels import launch, norm
from lens_kernels.backends.triton.kernels.gradients import gradient_chunk
from lens_kernels.backends.triton.kernels.operands import Operand, RowStats, RowSums
from lens_kernels.options import Divergence
from tests.support.compare import assert_close

STRIDE = 1 << 30
ROWS = 4
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def far_apart(x):
    """Return a copy whose rows are 2^30 elements apart, in memory that is reserved but not used."""
    assert x.shape[0] == ROWS and (ROWS - 1) * STRIDE >= 1 << 31
    reach = ROWS * STRIDE + x.shape[1]
    before = 1 << 31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, (before + reach) * x.element_size(), flags=flags)
    flat = torch.frombuffer(memory, dtype=x.dtype)
    return flat.as_strided(x.shape, (STRIDE, 1), before).copy_(x)


def solve(hidden, teacher, student_head, teacher_head):
    leaves = [hidden.detach().requires_grad_(), student_head.weight.detach().requires_grad_()]
    head = LensHead(leaves[1], norm=student_head.norm)
    loss = symmetric_lens_loss(leaves[0], teacher, head, teacher_head, backend="triton")
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("far", ["student_head", "teacher_head", "student", "teacher", "normed"])
def test_rows_far_apart_are_read_in_place(far):
    def rows(name, width):
        x = torch.randn(ROWS, width).to(torch.float16)
        return x, far_apart(x) if name == far.replace("normed", "student") else x

    layer_norm = LensNorm("layer", None, eps=1e-3) if far == "normed" else None
    hidden, teacher = rows("student", 32), rows("teacher", 16)
    weight, teacher_weight = rows("student_head", 32), rows("teacher_head", 16)
    results = [
        solve(hidden[i], teacher[i], LensHead(weight[i], norm=layer_norm), teacher_weight[i])
        for i in (0, 1)
    ]
    for near, distant in zip(*results, strict=True):
        assert near.any() and torch.equal(near, distant)


def test_the_gradient_s_rows_may_be_far_apart():
    def operand(width):
        x, weight = torch.randn(ROWS, width), torch.randn(64, width)
        return Operand(x, weight, None, 1.0, None, 1.0)

    def stats(side):
        z = side.x @ side.weight.t()
        highest = z.amax(1)
        return RowStats(highest, (z - highest[:, None]).exp().sum(1).log())

    student, teacher = operand(32), operand(16)
    sums = RowSums(torch.zeros(ROWS), torch.zeros(ROWS), stats(student), stats(teacher))
    tile = launch.Tile(16, 32, 16, 4, 1)
    z_s, z_t = (side.x @ side.weight.t() for side in (student, teacher))
    expected = z_s.softmax(-1) - z_t.softmax(-1)
    out = far_apart(torch.full((ROWS, 64), float("nan")))
    gradient_chunk(
        student, teacher, sums, torch.ones(ROWS), None, Divergence.FORWARD_KL, 0.5, 64, 0, out, tile
    )
    assert_close(out, expected, 1e-5)


@pytest.mark.parametrize("far", ["hidden", "grad", "d_hidden"])
def test_the_norm_s_rows_may_be_far_apart(far):
    layer_norm = LensNorm("layer", torch.randn(32), eps=1e-3)
    hidden, grad = torch.randn(2, ROWS, 32)
    _, x_hat, rstd = layer_norm.forward(hidden)
    expected = layer_norm.backward(grad, x_hat, rstd)
    tensors = {"hidden": hidden, "grad": grad, "d_hidden": torch.full((ROWS, 32), float("nan"))}
    tensors[far] = far_apart(tensors[far])
    norm.norm_backward(
        tensors["grad"], tensors["hidden"], None, layer_norm, tensors["d_hidden"], None, None
    )
    assert_close(tensors["d_hidden"], expected, 1e-6)


def test_the_norm_s_result_may_be_far_apart():
    layer_norm = LensNorm("layer", torch.randn(32), eps=1e-3)
    hidden, out = torch.randn(ROWS, 32), far_apart(torch.full((ROWS, 32), float("nan")))
    options = norm._options(layer_norm, 32)
    norm.norm_kernel[(triton.cdiv(ROWS, options["BLOCK_N"]),)](
        hidden, None, layer_norm.weight, None, out, hidden.stride(0), out.stride(0), ROWS, 32,
        layer_norm.eps, layer_norm.offset, **options,
    )  # fmt: skip
    assert_close(out, layer_norm.forward(hidden)[0], 1e-6)
