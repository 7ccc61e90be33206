"""Triton's interpreter, as the library corrects it, rounds and multiplies like torch."""

import pytest
import torch
import triton
import triton.language as tl

from lens_kernels.backends.triton import interpreter
from tests.support.compare import assert_close


@pytest.fixture(autouse=True, scope="module")
def _prepared():
    interpreter.prepare()


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, ROUNDED: tl.constexpr, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + rows * SIZE + columns)
    b = tl.load(b_ptr + rows * SIZE + columns)
    if ROUNDED:
        a = a.to(tl.bfloat16)
        b = b.to(tl.bfloat16)
    out = tl.dot(a, b, tl.full((SIZE, SIZE), 1.0, tl.float32), input_precision="ieee")
    tl.store(out_ptr + rows * SIZE + columns, out)


def cast(x, dtype):
    out = torch.zeros(x.shape, dtype=dtype)
    cast_kernel[(x.numel() // 256,)](x, out, BLOCK=256)
    return out


def specials():
    """Return float32 numbers at and next to rounding ties, and the smallest and largest numbers."""
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x00008000, 0x00018000, 0x7F7F8000, 0x7F7F7FFF])
    ties = torch.cat([ties - 1, ties, ties + 1]).to(torch.int32).view(torch.float32)
    info = torch.finfo(torch.float32)
    ends = torch.tensor([0.0, info.tiny, info.smallest_normal / 2, 1e-45, info.max, 3.4e38])
    every = torch.cat([ties, ends, torch.tensor([float("inf"), float("nan")])])
    return torch.cat([every, -every])


def test_rounding_is_torch_s_bit_for_bit():
    # Random bits give floats of every kind, such as subnormal numbers.
    patterns = torch.randint(-(2**31), 2**31, (1 << 16,)).to(torch.int32)
    x = torch.cat([patterns.view(torch.float32), torch.randn(1 << 12), specials()])
    x = torch.cat([x, torch.zeros(-x.numel() % 256)])
    got, expected = cast(x, torch.bfloat16), x.to(torch.bfloat16)
    nan = x.isnan()
    assert nan.any() and torch.equal(got.isnan(), nan)
    same = got.view(torch.int16) == expected.view(torch.int16)
    assert bool(same[~nan].all()), x[~nan][~same[~nan]][:5]
    cut = (x.view(torch.int32) >> 16).to(torch.int16)
    assert (cut != expected.view(torch.int16))[~nan].float().mean() > 0.4, (
        "truncation would pass this test"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rounded", [False, True])
def test_dot_multiplies_the_values(dtype, rounded):
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.zeros(32, 32)
    dot_kernel[(1,)](a, b, out, ROUNDED=rounded, SIZE=32)
    if rounded:
        a, b = a.bfloat16(), b.bfloat16()
    assert_close(out, 1 + a.double() @ b.double(), 5e-7)
