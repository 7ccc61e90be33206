"""The kernels for the norm agree with ``LensNorm``, for any number of rows, blocks and programs."""

import pytest
import torch
import triton

from lens_kernels import LensNorm
from lens_kernels.backends.triton import interpreter
from lens_kernels.backends.triton.kernels import launch, norm
from tests.support.compare import assert_close, assert_gradients

KINDS = {
    "rms": {"kind": "rms", "weight": True},
    "rms_plain": {"kind": "rms"},
    "rms_offset": {"kind": "rms", "weight": True, "offset": 1.0},
    "layer": {"kind": "layer", "weight": True, "bias": True, "offset": 0.5},
}
WIDTH = 300
# The number of rows of width 512 in a block of the kernels.
BLOCK_N = norm.BLOCK // 512
PROGRAMS = 2 * launch.processors(torch.device("cpu"))
# The numbers of rows in the tests: one; one full block; a block for each program and one more row;
# several blocks for each program and a partial block.
TOKENS = [1, BLOCK_N, BLOCK_N * PROGRAMS + 1, BLOCK_N * 19 + 3]


def make(name):
    kind = KINDS[name]
    weight, bias = (torch.randn(WIDTH) if kind.get(x) else None for x in ("weight", "bias"))
    return LensNorm(kind["kind"], weight, bias, eps=1e-3, offset=kind.get("offset", 0.0))


def indexed(tokens, masked):
    """Return hidden states, and the indices of the unmasked rows, or None without a mask."""
    if not masked:
        return torch.randn(tokens, WIDTH), None
    hidden = torch.randn(2 * tokens + 1, WIDTH)
    index = torch.randperm(len(hidden))[:tokens].sort().values
    counted = torch.zeros(len(hidden), dtype=torch.bool)
    counted[index] = True
    return hidden.masked_fill(~counted[:, None], float("nan")), index


def wide(x):
    return None if x is None else x.double().requires_grad_()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", KINDS)
def test_rows_and_their_gradients(name, tokens, masked):
    layer_norm = make(name)
    hidden, index = indexed(tokens, masked)
    options = norm._options(layer_norm, WIDTH)
    assert options["BLOCK_N"] == BLOCK_N and triton.cdiv(TOKENS[-1], BLOCK_N) > 2 * PROGRAMS

    truth = LensNorm(
        layer_norm.kind, wide(layer_norm.weight), wide(layer_norm.bias),
        eps=layer_norm.eps, offset=layer_norm.offset,
    )  # fmt: skip
    rows = wide(hidden if index is None else hidden[index])
    expected = truth.forward(rows)[0]
    assert_close(norm.norm_rows(hidden, index, layer_norm, torch.float32), expected, 1e-6)

    grad = torch.randn(tokens, WIDTH)
    leaves = {"hidden": rows, "weight": truth.weight, "bias": truth.bias}
    leaves = {key: x for key, x in leaves.items() if x is not None}
    grads = torch.autograd.grad(expected, list(leaves.values()), grad.double())
    before = {key: torch.randn(WIDTH) for key in ("weight", "bias") if key in leaves}
    got = {key: x.clone() for key, x in before.items()}
    got["hidden"] = torch.zeros(hidden.shape)
    norm.norm_backward(
        grad, hidden, index, layer_norm, got["hidden"], got.get("weight"), got.get("bias")
    )
    for key, x in before.items():
        # The kernel adds to the buffer, so subtract the buffer's old values.
        got[key] = got[key] - x
    if index is not None:
        others = torch.ones(len(hidden), dtype=torch.bool)
        others[index] = False
        assert not got["hidden"][others].any()
        got["hidden"] = got["hidden"][index]
    assert_gradients(got, dict(zip(leaves, grads, strict=True)), 2e-6)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_one_gradient_without_the_others(wanted):
    layer_norm = make("layer")
    hidden, grad = torch.randn(2, 50, WIDTH)
    every, one = ([torch.zeros(50, WIDTH), torch.zeros(WIDTH), torch.zeros(WIDTH)] for _ in "ab")
    norm.norm_backward(grad, hidden, None, layer_norm, *every)
    at = ["hidden", "weight", "bias"].index(wanted)
    only = [x if i == at else None for i, x in enumerate(one)]
    norm.norm_backward(grad, hidden, None, layer_norm, *only)
    assert one[at].any() and torch.equal(one[at], every[at])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_result_is_rounded_once(dtype):
    interpreter.prepare()
    layer_norm = make("layer")
    hidden = torch.randn(50, WIDTH).to(dtype)
    got = norm.norm_rows(hidden, None, layer_norm, dtype)
    exact = layer_norm.forward(hidden.double())[0]
    assert got.dtype is dtype
    # Without rounding errors of float32, the result would be the nearest 16-bit number.
    spacing = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    assert bool(((got.double() - exact).abs() <= 0.501 * spacing + 1e-6).all())
