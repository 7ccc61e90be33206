"""The sweeps with standardised logits and with sparse targets, over several tiles and splits."""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

from lens_kernels import SparseTargets, cost, symmetric_lens_loss
from lens_kernels.backends import triton as backend
from lens_kernels.backends.triton import interpreter
from lens_kernels.backends.triton.kernels import launch
from lens_kernels.backends.triton.tiles import sizes
from lens_kernels.backends.triton.tiles.sizes import Tile
from lens_kernels.cost import CallShape
from lens_kernels.options import Divergence
from lens_kernels.targets import target_rows
from tests.support.compare import GRADIENT, assert_close
from tests.support.grids import FEATURES, Shape
from tests.support.objectives import make_objective, some_targets
from tests.support.problems import capture_call, check, loss_of, make
from tests.test_targets import check as check_sparse
from tests.test_targets import check_beside_labels, sparse

# The sweeps divide 211 entries into 7 tiles, and 5 rows into one block.
SMALL = Shape((5,), 211, 24, 16, 1)
TILE = Tile(16, 32, 16, 4, 1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Use two splits of the vocabulary, with four tiles and three."""
    interpreter.prepare()
    monkeypatch.setattr(sizes, "default", lambda *args: TILE)
    monkeypatch.setattr(launch, "processors", lambda device: 1)
    grid = launch.SplitGrid(5, SMALL.vocab, TILE, torch.device("cpu"))
    assert (grid.splits, grid.tiles_per_split) == (2, 4)


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl", "jeffreys"])
def test_standardised_logits(divergence):
    """The teacher has its own temperature. A large mean of the logits costs no digits."""
    problem = make(SMALL, bias=True, temperature=1.7, divergence=divergence)
    options = {"standardize": True, "teacher_temperature": 0.6, "backend": "triton"}
    check(problem, **options)
    for head in (problem.student_head, problem.teacher_head):
        head.bias.data.add_(300.0)
    check(problem, 1e-4, 1e-4, **options)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("rest", [None, "ghost", "uniform"])
def test_sparse_targets(rest, standardize):
    """A tile has many targets, few, or none. Some rows list a token twice."""
    problem = make(SMALL, std=2.0, **{**FEATURES["everything"], "temperature": 1.0})
    targets = some_targets(SMALL, 40, rest)
    targets.token_ids[:, :20] %= 40
    mask = torch.tensor([True, True, False, True, True])
    options = {"mask": mask, "temperature": 1.7, "standardize": standardize}
    check_sparse(problem, targets, "triton", **options)


@pytest.mark.parametrize("standardize", [False, True])
def test_labels_beside_targets_and_a_bound(standardize):
    problem, labels = make(SMALL, std=2.0, bias=True), torch.tensor([0, 210, 3, 31, 32])
    targets = some_targets(SMALL, 8, "ghost")
    targets.token_ids[:, 0] = labels
    room = 2 * 5 * 32 * 4  # a chunk of the vocabulary has two tiles
    given = problem, targets, labels, "triton", GRADIENT, standardize
    assert 0 < check_beside_labels(*given, workspace_bytes=room) < 1


def test_gradients_at_targets_are_rounded_once():
    """Where student and teacher agree, ``q - t`` is far smaller than the rounding of each."""
    problem = make(SMALL, std=8.0).to(torch.bfloat16)
    hidden, weight = problem.student_hidden[0], problem.student_head.weight.detach().double()
    z = hidden.detach().double() @ weight.T
    top = z.softmax(-1).topk(30)
    p = top.values * (1 + 1e-2 * torch.randn(5, 30))
    loss = sparse(problem, SparseTargets(top.indices, p), backend="triton")
    (grad,) = torch.autograd.grad(loss, hidden)
    t = torch.zeros_like(z).scatter(-1, top.indices, p)
    expected = (z.softmax(-1) * p.sum(-1, keepdim=True) - t) @ weight / 5
    assert_close(grad, expected, 1e-2)


@pytest.mark.parametrize("kind", ["standardize", "ghost"])
def test_a_row_with_nan_spoils_no_other_row(kind):
    problem = make(SMALL, std=2.0)
    poison = torch.arange(5) == 2
    spoiled = problem.spoil(poison)
    options = {"backend": "triton", "reduction": "none"}
    if kind == "ghost":
        loss = sparse(spoiled, some_targets(SMALL, 8, "ghost"), **options)
    else:
        loss = loss_of(symmetric_lens_loss, spoiled, standardize=True, **options)
    (grad,) = torch.autograd.grad(loss.sum(), spoiled.student_hidden[0])
    assert torch.equal(loss[0].isnan(), poison)
    assert torch.equal(grad.isnan().any(-1), poison) and grad[2].isnan().all()


def test_infinite_logits_that_are_standardised_give_nan():
    problem = make(SMALL, bias=True)
    with torch.no_grad():
        problem.student_head.bias[7] = -float("inf")
    assert loss_of(symmetric_lens_loss, problem, standardize=True, backend="triton").isnan()


@contextmanager
def counted_operations():
    """Count the operations of the kernels' products in a list with one number."""
    counted = [0]
    builder = interpreter.compat.triton_interpreter().InterpreterBuilder
    create_dot = builder.create_dot

    def counting(self, a, b, *args):
        counted[0] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return create_dot(self, a, b, *args)

    with mock.patch.object(builder, "create_dot", counting):
        yield counted


OWN_LABELS = [{"temperature": 2.0}, {"standardize": True}]


@pytest.mark.parametrize(
    ("options", "number"), [({}, 0), ({"standardize": "lens"}, 0), *((x, 1) for x in OWN_LABELS)]
)
def test_the_plan_counts_the_sweep_of_labels_that_share_no_logits(monkeypatch, options, number):
    shape = Shape((16,), 64, 16, 32, 1)
    options = {"labels": torch.arange(16), "kd_ratio": 0.5, "final_divergence": "jsd", **options}
    call = capture_call(monkeypatch, make_objective(shape), whole=True, **options)
    with torch.no_grad(), counted_operations() as counted:
        backend.evaluate(call)
    steps = cost.vocabulary_sweeps(CallShape.of(call)).steps
    assert counted[0] == sum(s.flops for s in steps if s.product_time == cost.SWEEP_TIME)
    names = [step.name for step in steps]
    assert names.count("log-sum-exps for the labels") == number


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "targets"])
def test_the_plan_counts_the_products_of_every_sweep(monkeypatch, kind, with_grad):
    """Only the first of two pairs is standardised. Given statistics of the teacher are then unused.

    All sizes are multiples of the tile.
    """
    problem = make(Shape((16,), 64, 16, 32, 2), divergence=kind if kind != "targets" else "jsd")
    options = {} if kind == "targets" else {"teacher_statistics": torch.zeros(2, 16, 2)}
    call = replace(capture_call(monkeypatch, problem, **options), standardized=(True, False))
    if kind == "targets":
        rows = target_rows(some_targets(Shape((16,), 64, 16, 32, 2)), 64, torch.float32)
        kinds = (Divergence.FORWARD_KL,) * 2
        call = replace(call, teacher_hidden=[], teacher_heads=(), targets=rows, divergences=kinds)
    if not with_grad:
        call.needs_grad[:] = [False] * len(call.needs_grad)
    with torch.no_grad(), counted_operations() as counted:
        backend.evaluate(call)
    plan = cost.vocabulary_sweeps(CallShape.of(call))
    planned = sum(step.flops for step in plan.steps if step.product_time == cost.SWEEP_TIME)
    assert counted[0] == planned
    # The number of sweeps over the student, or over both models. Statistics save one teacher sweep.
    one, both = 2 * 16 * 64 * 16, 2 * 16 * 64 * 48
    expected = {"jsd": (3 + 2) * both - 2 * one, "forward_kl": (2 + 1 + with_grad) * both}
    expected["targets"] = 3 * one
    each = one if kind == "targets" else both
    assert planned == expected[kind] + 2 * with_grad * each
