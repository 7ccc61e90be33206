"""The path of 16-bit operands on CUDA for every backend, with its GEMMs emulated on the CPU.

CUDA multiplies 16-bit factors into float32 results, and the tile of logit gradients is rounded to
16 bit before its GEMMs. ``torch.mm`` and ``torch.addmm`` have no such variant on a CPU. A dispatch
mode replaces it, under the rules of the CUDA kernels.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lens_kernels import dispatch, distillation_loss
from lens_kernels.backends import matmul
from tests.support.compare import assert_close, assert_gradients, relative_error
from tests.support.grids import (
    BACKENDS,
    BATCH,
    DIVERGENCES,
    FEATURES,
    FLOAT64_BACKENDS,
    ODD,
    Shape,
    several_chunks,
)
from tests.support.problems import capture_call, make, oracle, plain_torch, related

HALF = (torch.bfloat16, torch.float16)
backends = pytest.mark.parametrize("backend", BACKENDS)


class TensorCores(TorchDispatchMode):
    """Multiplies 16-bit matrices into float32, in float64 on the way."""

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
    """Return the 16-bit products of a pair: the torch backend multiplies by two heads as well."""
    return chunks * (2 if backend == "triton" else 4)


@pytest.fixture
def evaluate(monkeypatch, backend):
    """Run a call as CUDA would."""

    def natively(dtype, result, device):
        return matmul_natively(dtype, result, torch.device("cuda"))

    matmul_natively = matmul.multiplies_natively
    monkeypatch.setattr(matmul, "multiplies_natively", natively)
    monkeypatch.setattr(matmul, "_has_out_dtype", lambda factor: factor.dtype in HALF)

    def run(call):
        with TensorCores() as cores, torch.no_grad():
            result = dispatch.REGISTRY[backend].evaluate(call)
        loss = (call.row_weight * result.rows).sum()
        names = {i: f"hidden{i}" for i in range(len(call.student_hidden))}
        grads = {names.get(key, key): g for key, g in result.grads.items()}
        for i, h in enumerate(call.student_hidden):
            assert grads[f"hidden{i}"].shape == h.shape
        return loss, grads, cores.products

    return run


def flat(grads):
    """Hidden states of a call are flat over tokens."""
    return {k: g.flatten(0, -2) if k.startswith("hidden") else g for k, g in grads.items()}


@backends
@pytest.mark.parametrize(
    ("feature", "divergence"),
    [*(("plain", divergence) for divergence in DIVERGENCES), ("bias", "jsd"), ("softcap", "jsd")],
)
@pytest.mark.parametrize("dtype", HALF)
def test_loss_is_exact_and_gradients_bear_one_rounding(
    monkeypatch, evaluate, backend, dtype, feature, divergence
):
    problem = make(BATCH, std=3.0, **FEATURES[feature], divergence=divergence).to(dtype)
    call = capture_call(monkeypatch, problem, workspace_bytes=several_chunks(BATCH, 12))
    loss, grads, products = evaluate(call)
    # The torch backend has 10 bytes of tiles a logit: 9 rows in a chunk. The triton backend has 2,
    # in which the vocabulary's two tiles fit. The row kernel has 8 chunks of 9 rows of both pairs.
    chunks = 1 if backend == "triton" else 4
    assert products == BATCH.pairs * products_of(backend, chunks)
    expected, expected_grads = oracle(problem)
    assert_close(loss, expected, 1e-5)
    assert_gradients(grads, flat(expected_grads), 1e-2)


@backends
@pytest.mark.parametrize(("norm", "divergence"), [("rms", "jsd"), ("layer", "reverse_kl")])
@pytest.mark.parametrize("dtype", HALF)
def test_with_a_norm_its_result_is_rounded_as_models_do(
    monkeypatch, evaluate, dtype, norm, divergence
):
    """A factor of a 16-bit product has 16 bit: the loss is no better than that of torch, which
    rounds the logits besides, and no worse."""
    problem = make(BATCH, std=2.0, norm=norm, divergence=divergence).to(dtype)
    expected, expected_grads = oracle(problem)
    loss, grads, _ = evaluate(capture_call(monkeypatch, problem))
    rounded, rounded_grads = plain_torch(problem)
    ulp = torch.finfo(dtype).eps
    assert relative_error(loss, expected) <= relative_error(rounded, expected) + ulp / 4
    for name, truth in flat(expected_grads).items():
        baseline = relative_error(flat(rounded_grads)[name], truth)
        assert relative_error(grads[name], truth) <= baseline + 1e-3, name


@pytest.mark.parametrize(
    ("backend", "dtype"),
    # bfloat16 does not underflow, and the interpreter takes seconds.
    [("torch", torch.float16), ("torch", torch.bfloat16), ("triton", torch.float16)],
)
def test_gradients_of_a_long_batch_do_not_underflow(monkeypatch, evaluate, dtype):
    """The weight of a token would make entries of a tile that float16 does not have."""
    problem = make(Shape((4000,), 31, 8, 8, 1), std=2.0, layer_weights=[1e-8]).to(dtype)
    _, expected = oracle(problem)
    _, grads, _ = evaluate(capture_call(monkeypatch, problem))
    assert_gradients(grads, flat(expected), 1e-2)


@backends
@pytest.mark.parametrize("dtype", HALF)
def test_near_convergence(monkeypatch, evaluate, dtype):
    problem = related(ODD, std=3.0, distance=0.01).to(dtype)
    expected, expected_grads = oracle(problem)
    loss, grads, _ = evaluate(capture_call(monkeypatch, problem))
    assert_close(loss, expected, 1e-4)
    assert_gradients(grads, flat(expected_grads), 1e-2)


@backends
def test_autocast_multiplies_natively_too(monkeypatch, evaluate, backend):
    problem = make(ODD, std=2.0)
    rounded = problem.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        call = capture_call(monkeypatch, problem)
    loss, grads, products = evaluate(call)
    expected, expected_grads = oracle(rounded)
    assert products == products_of(backend, 1)
    assert_close(loss, expected, 1e-5)
    assert_gradients(grads, flat(expected_grads), 1e-2)


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("double", ["student", "teacher"])
def test_beside_a_float64_model_the_16_bit_one_is_widened(monkeypatch, evaluate, double):
    """CUDA has no product of 16-bit operands into float64."""
    problem = make(ODD).to(torch.bfloat16)
    wide = problem.to(torch.float64)
    for side in ("hidden", "head"):
        name = f"{double}_{side}"
        setattr(problem, name, getattr(wide, name))
    expected, expected_grads = oracle(problem)
    loss, grads, products = evaluate(capture_call(monkeypatch, problem))
    assert products == 0
    assert_close(loss, expected, 1e-12)
    assert_gradients(grads, flat(expected_grads), 1e-12)


@backends
def test_the_whole_objective(monkeypatch, evaluate):
    problem = make(BATCH, std=2.0).to(torch.bfloat16)
    finals = {
        "student_final": problem.student_hidden.pop(),
        "teacher_final": problem.teacher_hidden.pop(),
    }
    options = {"labels": torch.randint(BATCH.vocab, BATCH.leading), "kd_ratio": 0.5, **finals}
    call = capture_call(monkeypatch, problem, distillation_loss, **options)
    loss, grads, _ = evaluate(call)
    expected = distillation_loss(*problem.args(), **options, backend="reference").loss
    problem.student_hidden.append(finals["student_final"])
    assert_close(loss, expected, 1e-5)
    wide = problem.to(torch.float64)
    options["student_final"] = wide.student_hidden.pop()
    options["teacher_final"] = finals["teacher_final"].double()
    truth = distillation_loss(*wide.args(), **options, backend="reference").loss
    wide.student_hidden.append(options["student_final"])
    assert_gradients(grads, flat(wide.gradients(truth)), 1e-2)
