"""The choice of a backend: automatic, forced, ineligible, unknown."""

import dataclasses
import functools
import importlib.util
import json

import pytest
import torch

from lens_kernels import dispatch, plan, symmetric_lens_loss
from lens_kernels.backends import torch_chunked
from lens_kernels.backends.triton import tuned
from lens_kernels.dispatch import Backend, choose
from tests.compare import assert_close, assert_gradients
from tests.grids import BATCH, FEATURES, ODD, Shape, several_chunks
from tests.problems import loss_of, make, oracle, ours

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize("device", [CPU, CUDA, MPS, torch.device("xpu")])
def test_auto_finds_a_backend_everywhere(device):
    backend = choose("auto", device)
    assert backend.reservation(device) is None and backend.objection(device, False) is None
    if device is CPU:
        assert backend.name == "torch"
        assert backend.load() is torch_chunked


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_auto_never_means_the_reference(device):
    assert dispatch.REGISTRY["reference"].reservation(device)


def test_auto_takes_the_kernels_once_tuning_has_run_them(monkeypatch):
    """A GPU that is not there: only its file of tiles is asked, and no tensor is made on it."""
    assert [b.name for b in dispatch.automatic(CUDA)] == ["torch"]
    monkeypatch.setattr(tuned, "INTERPRETING", False)
    for found, names in (({}, ["torch"]), ({"a": "tile"}, ["torch", "triton"])):
        monkeypatch.setattr(tuned, "tiles", lambda device, found=found: found)
        assert [b.name for b in dispatch.automatic(CUDA)] == names
    assert [b.name for b in dispatch.automatic(CUDA, fp64=True)] == ["torch"]
    assert [b.name for b in dispatch.automatic(CPU)] == ["torch"]
    monkeypatch.setattr(tuned, "INTERPRETING", True)
    assert [b.name for b in dispatch.automatic(CUDA)] == ["torch"]


def test_a_compiled_graph_does_not_look_into_the_file_of_tiles(monkeypatch, tmp_path):
    (tmp_path / "tiles.json").write_text('{"a": "tile"}')
    tiles = functools.cache(lambda device: json.loads((tmp_path / "tiles.json").read_text()))
    monkeypatch.setattr(tuned, "INTERPRETING", False)
    monkeypatch.setattr(tuned, "tiles", tiles)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + len(dispatch.automatic(CUDA))

    assert function(torch.zeros(())) == 2


@pytest.mark.parametrize("how", ["eager", "fullgraph"])
def test_auto_takes_what_the_plan_says_is_cheaper(monkeypatch, how):
    """With room for tiles of logits nothing is projected again; without, the head is read and its
    gradient written anew for every few tokens."""
    entry = dispatch.REGISTRY["triton"]
    anywhere = dataclasses.replace(entry, reservation=lambda device: None)
    monkeypatch.setitem(dispatch.REGISTRY, "triton", anywhere)
    taken = []
    for name in ("torch", "triton"):
        module = dispatch.REGISTRY[name].load()

        def evaluate(call, name=name, original=module.evaluate):
            taken.append(name)
            return original(call)

        monkeypatch.setattr(module, "evaluate", evaluate)
    problem = make(Shape((64,), ODD.vocab, 160, 200, 1), std=2.0)
    torch._dynamo.reset()
    for workspace in (several_chunks(ODD, 64), several_chunks(ODD, 1)):

        def loss(workspace=workspace):
            return loss_of(symmetric_lens_loss, problem, workspace_bytes=workspace)

        if how == "fullgraph":
            loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert_gradients(problem.gradients(loss()), oracle(problem)[1], 1e-5)
    assert taken == ["torch", "triton"]
    with torch.no_grad():
        empty = torch.zeros(0, 4)
        assert symmetric_lens_loss(empty, empty, torch.ones(5, 4), torch.ones(5, 4)) == 0


def test_a_plan_of_a_call_is_made_of_its_own_sizes(monkeypatch):
    problem = make(Shape((3, 7), 50, 8, 12, 2), divergence="reverse_kl")
    problem.student_head.weight.requires_grad_(False)
    asked = []

    def choose(name, device, fp64, cost=None):
        if cost is not None:
            asked.append((cost("torch"), cost("triton")))
        return dispatch.REGISTRY["torch"]

    monkeypatch.setattr(dispatch, "choose", choose)
    loss_of(symmetric_lens_loss, problem, workspace_bytes=3000)
    options = {"dtype": torch.float32, "head_grad": False, "device": "cpu"}
    planned = plan(21, 50, 8, 12, pairs=2, divergence="reverse_kl", workspace_bytes=3000, **options)
    assert asked == [(planned["torch"].cost, planned["triton"].cost)]


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
