"""All backends with 16-bit operands, with the GEMMs of CUDA emulated on the CPU.

On CUDA, a GEMM of 16-bit operands can return float32. On a CPU it cannot, so a dispatch mode
emulates these GEMMs, with the restrictions of CUDA. The gradient of the logits is rounded to 16
bits before its GEMMs.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lens_kernels import dispatch
from lens_kernels.backends import matmul
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import (
    BACKENDS,
    BATCH,
    DIVERGENCES,
    FEATURES,
    FLOAT64_BACKENDS,
    ODD,
    ROW_KERNEL,
    Shape,
    several_chunks,
)
from tests.support.objectives import make_objective, solve_objective, some_labels
from tests.support.problems import capture_call, check_beside, make, oracle, plain_torch, related

HALF = (torch.bfloat16, torch.float16)
backends = pytest.mark.parametrize("backend", [*BACKENDS, ROW_KERNEL])


class TensorCores(TorchDispatchMode):
    """Emulates CUDA's GEMMs of 16-bit operands with float32 results, by computing in float64."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ not in ("mm", "addmm") or "dtype" not in str(func):
            return func(*args, **kwargs)
        *added, first, second, out_dtype = args
        assert first.dtype is second.dtype and first.dtype in HALF
        assert out_dtype is torch.float32, "CUDA has no other result for 16-bit operands"
        assert all(x.dtype is out_dtype for x in added) and not kwargs.keys() - {"out"}
        self.products += 1
        result = (first.double() @ second.double() + sum(x.double() for x in added)).float()
        return kwargs["out"].copy_(result) if "out" in kwargs else result


def products_of(backend, chunks):
    """Return the number of 16-bit GEMMs for one lens pair.

    The triton backend computes its logits inside kernels, without a GEMM.
    """
    return chunks * (2 if backend == "triton" else 4)


@pytest.fixture
def evaluate(monkeypatch, backend):
    """Return a function that evaluates a call as on CUDA.

    It returns ``(loss, gradients)`` and the number of 16-bit GEMMs.
    """

    def natively(dtype, result, device):
        return matmul_natively(dtype, result, torch.device("cuda"))

    matmul_natively = matmul.multiplies_natively
    monkeypatch.setattr(matmul, "multiplies_natively", natively)
    monkeypatch.setattr(matmul, "_has_out_dtype", lambda factor: factor.dtype in HALF)

    def run(problem, whole=False, context=contextlib.nullcontext, **options):
        with context():
            call = capture_call(monkeypatch, problem, whole, **options)
        with TensorCores() as cores, torch.no_grad():
            result = dispatch.REGISTRY[backend].evaluate(call)
        loss = (call.row_weight * result.rows).sum()
        leaves = problem.leaves()
        named = {f"hidden{k}" if isinstance(k, int) else k: g for k, g in result.grads.items()}
        # The backend works on matrices, so the gradients get their original shapes back here.
        return (loss, {k: g.view(leaves[k].shape) for k, g in named.items()}), cores.products

    return run


def check(got, truth, loss_tolerance=1e-5, tolerance=1e-2):
    assert_close(got[0], truth[0], loss_tolerance)
    assert_gradients(got[1], truth[1], tolerance)


@backends
@pytest.mark.parametrize(
    ("feature", "divergence"),
    [*(("plain", divergence) for divergence in DIVERGENCES), ("bias", "jsd"), ("softcap", "jsd")],
)
@pytest.mark.parametrize("dtype", HALF)
def test_the_loss_is_exact_and_gradients_are_rounded_once(
    evaluate, backend, dtype, feature, divergence
):
    problem = make(BATCH, std=3.0, **FEATURES[feature], divergence=divergence).to(dtype)
    got, products = evaluate(problem, workspace_bytes=several_chunks(BATCH, 12))
    # The torch backend needs 10 bytes for each logit, so a chunk has 9 rows. The row kernel
    # processes both pairs together, in 8 chunks of 9 rows. The triton backend needs 2 bytes for
    # each logit, so one chunk holds the whole vocabulary.
    chunks = 1 if backend == "triton" else 4
    assert products == BATCH.pairs * products_of(backend, chunks)
    check(got, oracle(problem))


@backends
@pytest.mark.parametrize(("norm", "divergence"), [("rms", "jsd"), ("layer", "reverse_kl")])
@pytest.mark.parametrize("dtype", HALF)
def test_the_norm_s_result_is_rounded_to_16_bits(evaluate, dtype, norm, divergence):
    """The loss is about as accurate as that of plain torch."""
    problem = make(BATCH, std=2.0, norm=norm, divergence=divergence).to(dtype)
    ulp = torch.finfo(dtype).eps
    check_beside(
        plain_torch(problem),
        evaluate(problem)[0],
        oracle(problem),
        lambda error: error + ulp / 4,
        lambda error: error + 1e-3,
    )


@pytest.mark.parametrize(
    ("backend", "dtype"),
    # For triton, bfloat16 is left out: it cannot underflow, and the interpreter is slow.
    [("torch", torch.float16), ("torch", torch.bfloat16), ("triton", torch.float16)],
)
def test_gradients_of_a_long_batch_do_not_underflow(evaluate, dtype):
    """Token weights before the GEMMs would make the logits' gradient underflow in float16."""
    problem = make(Shape((4000,), 31, 8, 8, 1), std=2.0, layer_weights=[1e-8]).to(dtype)
    check(evaluate(problem)[0], oracle(problem))


@backends
@pytest.mark.parametrize("dtype", HALF)
def test_near_convergence(evaluate, dtype):
    problem = related(ODD, std=3.0, distance=0.01).to(dtype)
    check(evaluate(problem)[0], oracle(problem), 1e-4)


@backends
def test_autocast_multiplies_natively_too(evaluate, backend):
    problem = make(ODD, std=2.0)
    got, products = evaluate(problem, context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert products == products_of(backend, 1)
    check(got, oracle(problem.to(torch.bfloat16)))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("double", ["student", "teacher"])
def test_a_16_bit_model_is_widened_if_the_other_is_float64(evaluate, double):
    """If one model is float64, the other is converted, because CUDA GEMMs need equal dtypes."""
    problem = make(ODD).to(torch.bfloat16).to(torch.float64, double)
    got, products = evaluate(problem)
    assert products == 0
    check(got, oracle(problem), 1e-12, 1e-12)


@backends
def test_the_whole_objective(evaluate):
    problem = make_objective().to(torch.bfloat16)
    options = {"labels": some_labels(), "kd_ratio": 0.5}
    got, _ = evaluate(problem, whole=True, **options)
    wide = problem.to(torch.float64)
    truth, grads = solve_objective(wide, backend="reference", **options)
    check(got, (truth.loss, grads))
