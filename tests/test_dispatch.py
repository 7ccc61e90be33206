"""The choice of a backend: automatic, forced, ineligible, unknown."""

import importlib.util

import pytest
import torch

from lens_kernels import dispatch, symmetric_lens_loss
from lens_kernels.backends import torch_chunked
from lens_kernels.dispatch import Backend, choose
from tests.compare import assert_close, assert_gradients
from tests.grids import BATCH, FEATURES, ODD
from tests.problems import loss_of, make, oracle, ours

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize("device", [CPU, CUDA, MPS, torch.device("xpu")])
def test_auto_finds_a_backend_everywhere(device):
    backend = choose("auto", device)
    assert backend.automatic and backend.objection(device, False) is None
    if device is CPU:
        assert backend.name == "torch"
        assert backend.load() is torch_chunked


def test_auto_never_means_the_reference():
    assert not dispatch.REGISTRY["reference"].automatic


def test_auto_passes_over_a_backend_that_objects(monkeypatch):
    def objection(device, fp64):
        return None if device.type == "cuda" else "no GPU"

    picky = Backend("picky", "nowhere", objection)
    monkeypatch.setattr(dispatch, "REGISTRY", {"picky": picky, **dispatch.REGISTRY})
    assert choose("auto", CPU).name == "torch"
    assert choose("auto", CUDA).name == "picky"
    with pytest.raises(RuntimeError, match="'picky'.*cpu.*no GPU.*'torch'"):
        choose("picky", CPU)
    with pytest.raises(RuntimeError, match="no GPU"):
        loss_of(symmetric_lens_loss, make(ODD), backend="picky")


def test_a_forced_backend_that_cannot_be_imported_says_so(monkeypatch):
    broken = Backend("broken", "lens_kernels.no_such_module", lambda device, fp64: None)
    monkeypatch.setattr(dispatch, "REGISTRY", {"broken": broken, **dispatch.REGISTRY})
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        loss_of(symmetric_lens_loss, make(ODD), backend="broken")


def test_an_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="'trition'.*'auto'.*'torch'.*'triton'.*'reference'"):
        choose("trition", CPU)


def test_the_reference_objects_where_it_cannot_run(monkeypatch):
    with pytest.raises(RuntimeError, match="'reference'.*mps.*float64"):
        choose("reference", MPS)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "reference" else find(name)
    )
    with pytest.raises(RuntimeError, match="source checkout"):
        choose("reference", CPU)


def test_auto_is_the_torch_backend_on_a_cpu(monkeypatch):
    problem = make(ODD)
    expected = loss_of(symmetric_lens_loss, problem, backend="torch")
    assert torch.equal(loss_of(symmetric_lens_loss, problem), expected)
    monkeypatch.setattr(torch_chunked, "evaluate", lambda call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(symmetric_lens_loss, problem)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_the_reference_backend_is_the_oracle(feature, reduction):
    problem = make(BATCH, **FEATURES[feature])
    mask = torch.rand(BATCH.leading) < 0.5
    with torch.no_grad():
        for h in (*problem.student_hidden, *problem.teacher_hidden):
            h[~mask] = 0.0  # the oracle multiplies by its mask
    options = {"mask": mask, "reduction": reduction}
    expected, expected_grads = oracle(problem, **options)
    upstream = torch.ones(expected.shape)
    loss, grads = ours(problem, upstream=upstream, backend="reference", **options)
    assert loss.dtype is torch.float32
    assert_close(loss, expected, 1e-7)
    assert_gradients(grads, expected_grads, 1e-6)


def test_the_reference_backend_drops_masked_rows():
    problem = make(BATCH, norm="rms")
    mask = torch.rand(BATCH.leading) < 0.5
    expected, _ = ours(problem, mask=mask)
    with torch.no_grad():
        problem.student_hidden[0][~mask] = float("nan")
    loss, grads = ours(problem, mask=mask, backend="reference")
    assert_close(loss, expected, 1e-6)
    assert all(bool(torch.isfinite(g).all()) for g in grads.values())
