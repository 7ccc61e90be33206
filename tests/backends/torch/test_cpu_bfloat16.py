"""GEMMs in bfloat16 on CPUs with AMX: only calls with bfloat16 operands use them.

The tests pretend that AMX is detected, so that they run on every CPU. Operands are rounded if AMX
is detected, even if the hardware does not have it.
"""

import os
import signal
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lens_kernels import dispatch
from lens_kernels.backends import matmul
from tests.support.compare import assert_close
from tests.support.grids import BATCH, DIVERGENCES, FEATURES, ODD, several_chunks
from tests.support.objectives import check_objective, make_objective
from tests.support.problems import (
    capture_call,
    check,
    check_beside,
    make,
    oracle,
    ours,
    plain_torch,
)

SETTING = getattr(torch.backends.mkldnn, "matmul", None)
pytestmark = pytest.mark.skipif(SETTING is None, reason="needs torch 2.9")


has_amx = matmul._has_amx.__wrapped__


@pytest.fixture(autouse=True)
def amx(monkeypatch):
    """Pretend that the CPU has AMX."""
    monkeypatch.setattr(matmul, "_has_amx", lambda: True)


class Products(TorchDispatchMode):
    """Records oneDNN's precision setting during each GEMM."""

    def __init__(self):
        super().__init__()
        self.settings = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.settings.append(SETTING.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def settings(monkeypatch):
    """Return a function that runs a call, and returns the precision settings during its GEMMs."""

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
def test_the_loss_is_exact_and_gradients_are_rounded_once(
    always_active, feature, divergence, threshold
):
    problem = make(BATCH, std=3.0, **FEATURES[feature], divergence=divergence).to(torch.bfloat16)
    room = several_chunks(BATCH)
    check(problem, 1e-5, 1e-2, workspace_bytes=room, grad_threshold=threshold)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_norm_s_result_is_rounded_to_bfloat16(norm):
    problem = make(BATCH, std=2.0, norm=norm).to(torch.bfloat16)
    check_beside(
        plain_torch(problem),
        ours(problem),
        oracle(problem),
        lambda error: error + torch.finfo(torch.bfloat16).eps / 4,
        lambda error: error + 1e-3,
    )


def test_without_amx_normed_states_are_not_rounded(monkeypatch):
    monkeypatch.setattr(matmul, "_has_amx", lambda: False)
    problem = make(BATCH, std=2.0, norm="rms").to(torch.bfloat16)
    assert_close(ours(problem)[0], oracle(problem)[0], 1e-6)


@pytest.mark.parametrize("threshold", [None, 1e-7])
def test_only_bfloat16_operands_use_the_setting(always_active, settings, threshold):
    problem = make(ODD, norm="rms")
    before = SETTING.fp32_precision
    assert settings(problem.to(torch.bfloat16), grad_threshold=threshold) == {"bf16"}
    assert settings(problem, grad_threshold=threshold) == {before}
    assert settings(problem.to(torch.float16), grad_threshold=threshold) == {before}
    mixed = problem.to(torch.bfloat16, "student")
    assert settings(mixed, grad_threshold=threshold) == {"bf16", before}
    with torch.autocast("cpu", torch.bfloat16):
        assert settings(problem, grad_threshold=threshold) == {"bf16"}
    assert SETTING.fp32_precision == before


@pytest.mark.parametrize(
    "case", ["has it", "has none", "torch cannot tell", "torch has no setting"]
)
def test_amx_is_detected_from_the_cpu(monkeypatch, case):
    there = {"amx_bf16": case != "has none"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there, raising=False)
    if case == "torch cannot tell":
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    if case == "torch has no setting":
        monkeypatch.delattr(type(torch.backends.mkldnn), "matmul")
    assert has_amx() is (case == "has it")


def test_amx_is_not_used_for_float16():
    """Rounding operands to float16 would not be faster."""
    cpu = torch.device("cpu")
    assert matmul.multiplies_natively(torch.bfloat16, torch.float32, cpu)
    assert not matmul.multiplies_natively(torch.float16, torch.float32, cpu)


def test_nothing_is_rounded_if_the_other_model_is_float64():
    check(make(ODD).to(torch.bfloat16).to(torch.float64, "teacher"), 1e-7, 1e-2)


def test_adaptive_kl():
    problem = make_objective(ODD).to(torch.bfloat16)
    check_objective(problem, 1e-5, 1e-2, final_divergence="akl")


@pytest.fixture
def unset():
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

    def gemms():
        assert SETTING.fp32_precision == "bf16"
        _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        matmul._multiply(torch.bfloat16, gemms)
    assert SETTING.fp32_precision == before
    # If the setting for GEMMs was unset, it takes its value from oneDNN's general setting again.
    if own == "none":
        torch.backends.mkldnn.set_flags(_fp32_precision="bf16")
        assert SETTING.fp32_precision == "bf16"


def interrupted(run, number):
    """Interrupt ``run`` at its ``number``-th event. Return the error, or None without an event.

    An event is the call of a Python function or the return of a C function, because Python handles
    signals there.
    """
    seen = 0

    def profile(frame, event, _):
        nonlocal seen
        seen += event in ("call", "c_return")
        if seen == number:
            seen += 1
            raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.setprofile(before)
    return None


def test_an_interrupt_at_any_moment_leaves_the_users_setting():
    x, weight, out = (torch.zeros(4, 4, dtype=t) for t in (torch.bfloat16,) * 2 + (torch.float32,))
    before = SETTING.fp32_precision
    errors = []  # an error that is kept, as in a notebook, keeps the frames of its call alive
    for number in range(1, 1000):
        errors.append(interrupted(lambda: matmul.project(x, weight, out), number))
        assert SETTING.fp32_precision == before, number
        assert not matmul._lock.locked(), number
        if errors[-1] is None:
            break
    assert len(errors) > 20 and errors[-1] is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_process_forked_during_a_product_can_multiply():
    before = SETTING.fp32_precision
    inside, forked = threading.Event(), threading.Event()

    def gemms():
        inside.set()
        forked.wait()

    thread = threading.Thread(target=matmul._multiply, args=(torch.bfloat16, gemms), daemon=True)
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # the alarm ends the child process if it waits for the lock
        found = [SETTING.fp32_precision]
        matmul._multiply(torch.bfloat16, lambda: found.append(SETTING.fp32_precision))
        os._exit(found + [SETTING.fp32_precision] != [before, "bf16", before])
    forked.set()
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
    assert SETTING.fp32_precision == before


class SignallingLock:
    """A lock that sets an event when a thread has to wait for it."""

    def __init__(self, waiting):
        self.lock, self.waiting = threading.Lock(), waiting

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.waiting.set()
            self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()


def test_two_threads_restore_the_setting(monkeypatch):
    before = SETTING.fp32_precision
    first_is_in, second_waits_or_is_in = threading.Event(), threading.Event()
    monkeypatch.setattr(matmul, "_lock", SignallingLock(second_waits_or_is_in))

    def first():
        first_is_in.set()
        second_waits_or_is_in.wait()

    def second():
        second_waits_or_is_in.set()
        # Without the lock, this thread would end last, and restore the bf16 that the first thread
        # has set.
        threads[0].join()

    def run(gemms):
        if gemms is second:
            first_is_in.wait()
        matmul._multiply(torch.bfloat16, gemms)

    threads = [threading.Thread(target=run, args=(f,)) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert SETTING.fp32_precision == before
