"""The kernels' elementary functions agree with torch, and their divergences with the library's."""

import pytest
import torch
import triton
import triton.language as tl

from lens_kernels import divergence as table
from lens_kernels.backends.triton.kernels import device_fns
from lens_kernels.backends.triton.kernels.device_fns import log_sum, minus
from lens_kernels.backends.triton.kernels.pointwise import pointwise
from lens_kernels.options import Divergence
from tests.support.grids import DIVERGENCES

BETAS = [1e-6, 1e-5, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6]
CASES = [(divergence, 0.5) for divergence in DIVERGENCES if divergence != "jsd"]
CASES += [("jsd", beta) for beta in BETAS]
EPS = torch.finfo(torch.float32).eps
BLOCK = 1024


@triton.jit
def unary_kernel(x_ptr, out_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, FUNCTION(tl.load(x_ptr + at)))


@triton.jit
def minus_kernel(p_ptr, q_ptr, d_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = minus(tl.load(p_ptr + at), tl.load(q_ptr + at), tl.load(d_ptr + at))
    tl.store(out_ptr + at, y)


@triton.jit
def log_sum_kernel(total_ptr, x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, log_sum(tl.load(total_ptr + at), tl.load(x_ptr + at)))


@triton.jit
def table_kernel(
    lp_ptr, lq_ptr, f_ptr, h_ptr, beta, one_minus_beta, DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lp, lq = tl.load(lp_ptr + at), tl.load(lq_ptr + at)
    f, h = pointwise(lp, lq, beta, one_minus_beta, DIVERGENCE)
    tl.store(f_ptr + at, f)
    tl.store(h_ptr + at, h)


def over_blocks(kernel, *inputs, outputs=1, **options):
    """Run a kernel on float32 numbers, padded to full blocks, and return its results."""
    size = inputs[0].numel()
    more = -size % BLOCK
    padded = [torch.cat([x, x[:1].expand(more)]) for x in inputs]
    out = [torch.full_like(padded[0], float("nan")) for _ in range(outputs)]
    scalars = options.pop("scalars", ())
    kernel[(padded[0].numel() // BLOCK,)](*padded, *out, *scalars, **options, BLOCK=BLOCK)
    return [x[:size] for x in out]


def magnitudes(largest):
    """Return numbers from 1e-38 to ``largest``.

    Some of them are at or next to the limits where a function changes its formula.
    """
    spread = torch.logspace(-38, 0, 4001, dtype=torch.float64) * largest
    near = torch.tensor([device_fns.NEAR.value, 0.25, 0.29289, 0.75])
    near = torch.cat(
        [torch.nextafter(near, torch.zeros(())), near, torch.nextafter(near, near + 1)]
    )
    even = torch.linspace(0, largest, 4001)
    every = torch.cat([spread.float(), even, near])
    return every[every.abs() <= largest]


def unary(name, x):
    if name == "log1p":
        return over_blocks(log_sum_kernel, 1 + x, x)[0]
    return over_blocks(unary_kernel, x, FUNCTION=getattr(device_fns, name))[0]


RANGES = {
    "exp": torch.cat([magnitudes(80.0), -magnitudes(80.0)]),
    "expm1_near": torch.cat([magnitudes(0.5), -magnitudes(0.5)]),
    "log1p": torch.cat([magnitudes(1e6), -magnitudes(1 - 2.0**-24)]),
    "tanh": torch.cat([magnitudes(60.0), -magnitudes(60.0)]),
}


@pytest.mark.parametrize("name", RANGES)
def test_functions_have_a_small_relative_error(name):
    """Each function is accurate to 3e-7.

    The error of exp grows with its argument, because exp amplifies the argument's rounding.
    """
    x = RANGES[name]
    truth = getattr(torch, name.removesuffix("_near"))(x.double())
    got = unary(name, x)
    bound = 3e-7 + (EPS * x.abs().double() if name == "exp" else 0)
    excess = (got - truth).abs() / truth.abs().clamp(min=1e-45) / bound
    worst = int(excess.argmax())
    assert excess[worst] <= 1, f"{name}({x[worst]}) is {got[worst]}, not {truth[worst]}"
    if name != "exp":
        assert torch.equal(got.sign(), x.sign())


def test_functions_at_zero_infinity_and_nan():
    x = torch.tensor([1e30, -1e30, float("inf"), -float("inf"), 0.0, float("nan")])
    got = unary("tanh", x)
    assert got[:5].tolist() == [1.0, -1.0, 1.0, -1.0, 0.0] and got[5].isnan()
    got = unary("exp", x)
    assert got[:5].tolist() == [float("inf"), 0.0, float("inf"), 0.0, 1.0] and got[5].isnan()


def test_minus_does_not_cancel():
    """``minus`` computes p - q without cancellation.

    Its arguments are rounded values of p and q, and the exact difference ``d`` of their logarithms.
    """
    lq = -30 * torch.rand(8000)
    d = torch.cat([magnitudes(5.0), -magnitudes(5.0)])[torch.randperm(16000)[:8000]]
    d[:100] = 0.0
    lq, d = lq[: d.numel()], d[: lq.numel()]
    q = lq.double().exp().float()
    p = (q.double() * d.double().exp()).float()
    (got,) = over_blocks(minus_kernel, p, q, d)
    truth = q.double() * torch.expm1(d.double())
    assert bool(((got - truth).abs() <= 1e-6 * truth.abs().clamp(min=1e-37)).all())
    assert not got[d == 0].any()


@pytest.fixture(scope="module")
def log_probabilities():
    """Return log-probabilities of two models, in two lists.

    They contain all pairs of a grid, nearly equal pairs, and equal pairs. The exponentials of some
    values in the grid underflow.
    """
    torch.manual_seed(0)
    grid = torch.cat([torch.linspace(-12, 0, 25), torch.tensor([-20.0, -40.0, -80.0, -110.0])])
    lp, lq = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
    base = -12 * torch.rand(2000)
    near = base + torch.randn(2000) * torch.logspace(-7, 0, 2000)
    equal = -30 * torch.rand(200)
    equal[:2] = torch.tensor([0.0, device_fns.FLOOR.value])
    return torch.cat([lp, base, equal]), torch.cat([lq, near.clamp(max=0), equal])


def run_table(divergence, lp, lq, beta):
    # Round beta to float32, as a GPU does, because the interpreter keeps scalars in float64.
    scalars = torch.tensor([beta, 1 - beta]).tolist()
    return over_blocks(table_kernel, lp, lq, outputs=2, scalars=scalars, DIVERGENCE=divergence)


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_the_kernels_table_matches_the_library_s(log_probabilities, divergence, beta):
    """The kernels' formulas for divergences and their gradients match the library's.

    The allowed error is relative to the value and to |p - q|. It grows with the size of the
    log-probabilities, because their exponentials become less accurate.
    """
    lp, lq = log_probabilities
    wide = lp.double(), lq.double()
    p, q = (x.exp() for x in wide)
    truth = table.pointwise(Divergence(divergence), beta)(*wide, p, q, (beta, 1 - beta))
    digits = 1 + torch.maximum(lp, lq).abs().clamp(max=110) / 4
    for name, got, expected in zip("fh", run_table(divergence, lp, lq, beta), truth, strict=True):
        # The jsd is proportional to beta (1 - beta) where p is near q, and so is its allowed error.
        scale = 0.4 * beta * (1 - beta) if divergence == "jsd" else 0.1
        bound = 5e-6 * digits * (expected.abs() + scale * (p - q).abs())
        excess = (got - expected).abs() / bound.clamp(min=1e-41)
        worst = int(excess.argmax())
        at = f"{name} at {lp[worst]}, {lq[worst]}: {got[worst]}, not {expected[worst]}"
        assert excess[worst] <= 1, at
        assert bool(got.isfinite().all())


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_the_tables_agree_on_what_is_infinite(divergence, beta):
    """The pairs of probabilities combine 1/2, exp(-300) and 0."""
    some = torch.tensor([-0.7, -300.0, device_fns.FLOOR.value])
    lp, lq = (x.flatten() for x in torch.meshgrid(some, some, indexing="ij"))
    expected = table.pointwise(Divergence(divergence), beta)(
        lp, lq, lp.exp(), lq.exp(), (beta, 1 - beta)
    )
    for got, truth in zip(run_table(divergence, lp, lq, beta), expected, strict=True):
        assert torch.equal(got.isposinf(), truth.isposinf())


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_equal_probabilities_give_exact_zeros(log_probabilities, divergence, beta):
    lp, lq = log_probabilities
    f, h = run_table(divergence, lp, lq, beta)
    same = lp == lq
    assert same.sum() > 200
    assert not f[same].any() and not h[same].any()
    assert bool(f[~same & (torch.maximum(lp, lq) > -20)].any())
