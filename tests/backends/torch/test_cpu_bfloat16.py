"""bfloat16 factors on a CPU with a unit for their products, which oneDNN is told of for them alone.

What is computed hangs on that unit being there and not on its use: factors are rounded before.
So these tests mean the same on every CPU.
"""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lens_kernels import dispatch, distillation_loss
from lens_kernels.backends import matmul
from tests.support.compare import assert_close, assert_gradients, relative_error
from tests.support.grids import BATCH, DIVERGENCES, FEATURES, ODD, several_chunks
from tests.support.problems import capture_call, make, oracle, ours, plain_torch

SETTING = getattr(torch.backends.mkldnn, "matmul", None)
pytestmark = pytest.mark.skipif(SETTING is None, reason="needs torch 2.9")


has_amx = matmul._has_amx.__wrapped__


@pytest.fixture(autouse=True)
def amx(monkeypatch):
    """Have a CPU with AMX."""
    monkeypatch.setattr(matmul, "_has_amx", lambda: True)


class Products(TorchDispatchMode):
    """Notes the setting under which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.settings = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.settings.append(SETTING.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def settings(monkeypatch):
    """Return under which settings a call makes its products."""

    def run(problem, **options):
        options["workspace_bytes"] = several_chunks(ODD)
        call = capture_call(monkeypatch, problem, **options)
        with Products() as products, torch.no_grad():
            dispatch.REGISTRY["torch"].evaluate(call)
        return set(products.settings)

    return run


@pytest.mark.parametrize("threshold", [None, 1e-7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("feature", ["plain", "bias", "softcap"])
def test_loss_is_exact_and_gradients_bear_one_rounding(
    always_active, feature, divergence, threshold
):
    problem = make(BATCH, std=3.0, **FEATURES[feature], divergence=divergence).to(torch.bfloat16)
    options = {"workspace_bytes": several_chunks(BATCH), "grad_threshold": threshold}
    loss, grads = ours(problem, **options)
    expected, expected_grads = oracle(problem)
    assert_close(loss, expected, 1e-5)
    assert_gradients(grads, expected_grads, 1e-2)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_with_a_norm_its_result_is_rounded_as_models_do(norm):
    problem = make(BATCH, std=2.0, norm=norm).to(torch.bfloat16)
    expected, expected_grads = oracle(problem)
    loss, grads = ours(problem)
    rounded, rounded_grads = plain_torch(problem)
    limit = relative_error(rounded, expected) + torch.finfo(torch.bfloat16).eps / 4
    assert_close(loss, expected, limit)
    for name, truth in expected_grads.items():
        limit = relative_error(rounded_grads[name], truth) + 1e-3
        assert_close(grads[name], truth, limit, name)


def test_without_the_unit_normed_states_are_not_rounded(monkeypatch):
    monkeypatch.setattr(matmul, "_has_amx", lambda: False)
    problem = make(BATCH, std=2.0, norm="rms").to(torch.bfloat16)
    assert_close(ours(problem)[0], oracle(problem)[0], 1e-6)


@pytest.mark.parametrize("threshold", [None, 1e-7])
def test_only_products_of_bfloat16_factors_are_made_so(always_active, settings, threshold):
    problem = make(ODD, norm="rms")
    before = SETTING.fp32_precision
    assert settings(problem.to(torch.bfloat16), grad_threshold=threshold) == {"bf16"}
    assert settings(problem, grad_threshold=threshold) == {before}
    assert settings(problem.to(torch.float16), grad_threshold=threshold) == {before}
    mixed = problem.to(torch.bfloat16)
    mixed.teacher_hidden, mixed.teacher_head = problem.teacher_hidden, problem.teacher_head
    assert settings(mixed, grad_threshold=threshold) == {"bf16", before}
    with torch.autocast("cpu", torch.bfloat16):
        assert settings(problem, grad_threshold=threshold) == {"bf16"}
    assert SETTING.fp32_precision == before


@pytest.mark.parametrize("there", [True, False])
def test_the_cpu_is_asked(monkeypatch, there):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": there}, raising=False)
    assert has_amx() is there


def test_a_torch_that_cannot_tell_multiplies_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_amx()


def test_a_torch_that_cannot_be_told_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul")
    assert not has_amx()


def test_float16_has_no_such_unit():
    """Rounding the logits' gradient would be for nothing."""
    cpu = torch.device("cpu")
    assert matmul.multiplies_natively(torch.bfloat16, torch.float32, cpu)
    assert not matmul.multiplies_natively(torch.float16, torch.float32, cpu)


def test_beside_a_float64_model_nothing_is_rounded():
    problem = make(ODD).to(torch.bfloat16)
    wide = problem.to(torch.float64)
    problem.teacher_hidden, problem.teacher_head = wide.teacher_hidden, wide.teacher_head
    loss, grads = ours(problem)
    expected, expected_grads = oracle(problem)
    assert_close(loss, expected, 1e-7)
    assert_gradients(grads, expected_grads, 1e-2)


def test_adaptive_kl():
    problem = make(ODD, std=2.0).to(torch.bfloat16)
    finals = {
        "student_final": problem.student_hidden[0],
        "teacher_final": problem.teacher_hidden[0],
    }
    losses = [
        distillation_loss(*problem.args(), **finals, final_divergence="akl", backend=backend).kd
        for backend in ("torch", "reference")
    ]
    assert_close(*losses, 1e-5)


@pytest.fixture
def unset():
    """Leave the settings as they were."""
    yield
    torch.backends.mkldnn.set_flags(_fp32_precision="none")
    SETTING.fp32_precision = "none"


@pytest.mark.parametrize("own", ["ieee", "bf16", "none"])
@pytest.mark.parametrize("above", ["ieee", "tf32", "none"])
@pytest.mark.usefixtures("unset")
def test_the_users_settings_stay(own, above):
    torch.backends.mkldnn.set_flags(_fp32_precision=above)
    SETTING.fp32_precision = own
    before = SETTING.fp32_precision
    with pytest.raises(ZeroDivisionError), matmul._as_bfloat16(torch.bfloat16):
        assert SETTING.fp32_precision == "bf16"
        _ = 1 / 0
    assert SETTING.fp32_precision == before
    if own == "none":  # and what stands above still counts
        torch.backends.mkldnn.set_flags(_fp32_precision="bf16")
        assert SETTING.fp32_precision == "bf16"


class SignallingLock:
    """A lock that tells when a thread has to wait for it."""

    def __init__(self, waiting):
        self.lock, self.waiting = threading.Lock(), waiting

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.waiting.set()
            self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()


def test_two_threads_do_not_leave_it_set(monkeypatch):
    before = SETTING.fp32_precision
    first_is_in, second_waits_or_is_in = threading.Event(), threading.Event()
    monkeypatch.setattr(matmul, "_setting", SignallingLock(second_waits_or_is_in))

    def first():
        with matmul._as_bfloat16(torch.bfloat16):
            first_is_in.set()
            second_waits_or_is_in.wait()

    def second():
        first_is_in.wait()
        with matmul._as_bfloat16(torch.bfloat16):
            second_waits_or_is_in.set()
            threads[0].join()  # without a lock, the second to end restores what the first set

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert SETTING.fp32_precision == before
