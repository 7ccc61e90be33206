"""Backend selection: how ``auto`` chooses, how users choose, and which choices raise an error."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json

import pytest
import torch

from lens_kernels import dispatch, linear_cross_entropy, plan, symmetric_lens_loss
from lens_kernels.backends.torch import row_chunks
from lens_kernels.backends.triton.tiles import store
from lens_kernels.backends.triton.tiles.sizes import Sweep
from lens_kernels.cost import CallShape, Plan, Step
from lens_kernels.dispatch import Backend, choose
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import BATCH, FEATURES, ODD, Shape, several_chunks
from tests.support.problems import call_shape, capture_call, check, loss_of, make, oracle

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize("device", [CPU, CUDA, MPS, torch.device("xpu")])
def test_auto_finds_a_backend_everywhere_that_is_not_the_reference(device):
    backend = choose("auto", call_shape(device))
    assert backend.auto_excluded_reason(device, None) is None
    assert backend.unsupported_reason(device, False) is None
    assert dispatch.REGISTRY["reference"].auto_excluded_reason(device, None)
    if device is CPU:
        assert backend.name == "torch" and backend.module == row_chunks.__name__


def tuned_for(monkeypatch, *keys):
    """Pretend that the sweeps ``keys`` are tuned for a GPU, on which no tensor is created."""
    monkeypatch.setattr(store, "INTERPRETING", False)
    monkeypatch.setattr(store, "tiles", lambda device: dict.fromkeys(keys))


def test_auto_uses_the_kernels_only_after_tuning_has_finished(monkeypatch):
    bf16, fp32 = torch.bfloat16, torch.float32
    for done, operand, names in (
        ([], bf16, ["torch"]),
        # The tuning stopped before the last sweep.
        ([(Sweep.ROW_STATS, bf16, 64), (Sweep.ROW_SUMS, bf16, 64)], bf16, ["torch"]),
        ([(Sweep.GRADIENTS, bf16, 64)], bf16, ["torch", "triton"]),
        ([(Sweep.GRADIENTS, bf16, 64)], None, ["torch", "triton"]),
        ([(Sweep.GRADIENTS, bf16, 64)], fp32, ["torch"]),
    ):
        tuned_for(monkeypatch, *done)
        assert [b.name for b in dispatch.automatic(CUDA, operand=operand)] == names
    tuned_for(monkeypatch, (Sweep.GRADIENTS, bf16, 64))
    assert [b.name for b in dispatch.automatic(CUDA, fp64=True)] == ["torch"]
    assert [b.name for b in dispatch.automatic(CPU)] == ["torch"]
    monkeypatch.setattr(store, "INTERPRETING", True)
    assert [b.name for b in dispatch.automatic(CUDA)] == ["torch"]


@pytest.mark.parametrize("error", [ImportError("libcuda"), RuntimeError("no home"), OSError("x")])
def test_auto_is_torch_where_triton_is_broken(monkeypatch, error):
    def fail(device):
        raise error

    tuned_for(monkeypatch)
    monkeypatch.setattr(store, "tiles", fail)
    assert [b.name for b in dispatch.automatic(CUDA)] == ["torch"]
    assert str(error) in dispatch.REGISTRY["triton"].auto_excluded_reason(CUDA, None)


def test_a_compiled_graph_does_not_read_the_tile_file(monkeypatch, tmp_path):
    (tmp_path / "tiles.json").write_text('["gradients"]')

    @functools.cache
    def tiles(device):
        names = json.loads((tmp_path / "tiles.json").read_text())
        return {(Sweep(name), torch.bfloat16, 64): None for name in names}

    tuned_for(monkeypatch)
    monkeypatch.setattr(store, "tiles", tiles)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + len(dispatch.automatic(CUDA))

    assert function(torch.zeros(())) == 2


@pytest.mark.parametrize("how", ["eager", "fullgraph"])
def test_auto_uses_the_backend_that_the_plan_estimates_to_be_cheaper(monkeypatch, how):
    """A large workspace is cheaper with ``torch``, and a small workspace with ``triton``.

    With small chunks, ``torch`` reads the head and writes the head gradient again for every few
    tokens.
    """
    entry = dispatch.REGISTRY["triton"]
    anywhere = dataclasses.replace(entry, auto_excluded_reason=lambda *args: None)
    monkeypatch.setitem(dispatch.REGISTRY, "triton", anywhere)
    taken = []
    for name in ("torch", "triton"):
        module = importlib.import_module(dispatch.REGISTRY[name].module)

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


@pytest.mark.parametrize(
    ("frozen", "context", "planned_with"),
    [
        ((), contextlib.nullcontext, {}),
        (("weight",), contextlib.nullcontext, {"head_grad": False}),
        # Only the parameters of the norm are trained.
        (("weight", "hidden"), contextlib.nullcontext, {"head_grad": False}),
        (("hidden", "norm"), contextlib.nullcontext, {"hidden_grad": False}),
        ((), torch.no_grad, {"head_grad": False, "hidden_grad": False}),
        ((), lambda: torch.autocast("cpu", torch.bfloat16), {"dtype": torch.bfloat16}),
    ],
)
def test_a_call_is_planned_from_its_own_sizes(monkeypatch, frozen, context, planned_with):
    problem = make(Shape((3, 7), 50, 8, 12, 2), divergence="reverse_kl", norm="rms")
    problem.freeze(*(name for name in problem.leaves() if not name.startswith(frozen)))
    with context():
        call = capture_call(monkeypatch, problem, workspace_bytes=3000)
    options = {"dtype": torch.float32, "device": "cpu", "workspace_bytes": 3000, **planned_with}
    each = plan(21, 50, 8, 12, pairs=2, divergence="reverse_kl", **options)
    shape = CallShape.of(call)
    # ``plan`` assumes that the head has ``dtype``. Under autocast the head stays in float32.
    assert shape.head_dtype == torch.float32
    shape = dataclasses.replace(shape, head_dtype=shape.dtype)
    assert {name: dispatch.REGISTRY[name].cost(shape) for name in ("torch", "triton")} == {
        name: each[name] for name in ("torch", "triton")
    }


def free(shape):
    return Plan("free", (), 0)


def test_auto_skips_a_backend_that_does_not_support_the_tensors(monkeypatch):
    def unsupported_reason(device, fp64):
        return None if device.type == "cuda" else "no GPU"

    picky = Backend("picky", "nowhere", free, unsupported_reason)
    monkeypatch.setattr(dispatch, "REGISTRY", {"picky": picky, **dispatch.REGISTRY})
    assert choose("auto", call_shape(CPU)).name == "torch"
    assert choose("auto", call_shape(CUDA)).name == "picky"
    with pytest.raises(RuntimeError, match="'picky'.*cpu.*no GPU.*'torch'"):
        choose("picky", call_shape(CPU))
    with pytest.raises(RuntimeError, match="no GPU"):
        loss_of(symmetric_lens_loss, make(ODD), backend="picky")


def test_a_forced_backend_that_cannot_be_imported_says_so(monkeypatch):
    broken = Backend("broken", "lens_kernels.no_such_module", free)
    monkeypatch.setattr(dispatch, "REGISTRY", {"broken": broken, **dispatch.REGISTRY})
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        loss_of(symmetric_lens_loss, make(ODD), backend="broken")


def test_a_backend_added_by_the_recipe_takes_part_in_auto_and_in_the_plan(monkeypatch):
    """``auto`` and ``plan`` can use a backend that is added as documented.

    If two backends can run, ``auto`` takes the cheaper backend.
    """
    reference = dispatch.REGISTRY["reference"]
    for costs, taken in (
        (free, "new"),
        (lambda shape: Plan("expensive", (Step("x", 1 << 80, 0),), 0), "torch"),
    ):
        new = Backend("new", reference.module, costs)
        monkeypatch.setitem(dispatch.REGISTRY, "new", new)
        assert choose("auto", call_shape(CPU)).name == taken
        assert plan(5, 6, 7, 8)["new"] == costs(None)
    monkeypatch.setitem(dispatch.REGISTRY, "new", Backend("new", reference.module, free))
    problem = make(ODD)
    assert_close(loss_of(symmetric_lens_loss, problem), oracle(problem)[0], 1e-7)


def test_every_registered_backend_of_the_package_is_in_its_wheel():
    shipped = {name for name, x in dispatch.REGISTRY.items() if x.module.startswith("lens_kernels")}
    assert shipped == {"torch", "triton"}


def test_auto_is_the_torch_backend_on_a_cpu(monkeypatch):
    problem = make(ODD)
    expected = loss_of(symmetric_lens_loss, problem, backend="torch")
    assert torch.equal(loss_of(symmetric_lens_loss, problem), expected)
    monkeypatch.setattr(row_chunks, "evaluate", lambda call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(symmetric_lens_loss, problem)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_the_reference_backend_is_the_oracle_and_drops_masked_rows(feature, reduction):
    mask = torch.rand(BATCH.leading) < 0.5
    problem = make(BATCH, **FEATURES[feature])
    # The oracle multiplies losses by the mask, so the losses of its masked rows must be finite.
    truth = problem.spoil(~mask, 0.0)
    options = {"mask": mask, "reduction": reduction, "backend": "reference"}
    loss, _ = check(problem.spoil(~mask), truth=truth, **options)
    assert loss.dtype is torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_cost_of_a_call_contains_its_gradients(reduction, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        dispatch, "choose", lambda name, shape: shapes.append(shape) or dispatch.REGISTRY["torch"]
    )
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
    linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3, 4]), reduction=reduction)
    symmetric_lens_loss(hidden, torch.randn(4, 8), weight, weight, reduction=reduction)
    assert [shape.with_grad for shape in shapes] == [True, True]
