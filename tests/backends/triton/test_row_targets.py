"""The row kernel with standardised logits and with sparse targets matches the float64 oracle."""

import pytest
import torch

from lens_kernels.backends.torch.layout import has_row_kernel
from lens_kernels.backends.torch.passes import Terms
from lens_kernels.backends.torch.row_kernel_pass import RowKernelPass
from lens_kernels.backends.triton import interpreter
from lens_kernels.backends.triton.kernels import row_pass
from lens_kernels.targets import target_rows
from tests.backends.triton.test_row_pass import kinds
from tests.support.cluster_kernel_backend import small_clusters
from tests.support.compare import assert_close
from tests.support.grids import FEATURES, ROW_KERNEL, Shape
from tests.support.objectives import some_targets
from tests.support.problems import capture_call, check, make
from tests.test_targets import check as check_sparse
from tests.test_targets import check_beside_labels


@pytest.fixture
def lanes(monkeypatch):
    """Make the kernel read 128 entries at a time, so that a row takes two steps."""
    interpreter.prepare()
    monkeypatch.setitem(row_pass.OPTIONS, "LANES", 16)


# The backend ``row_kernel`` reads a row in two steps.
SMALL = Shape((2,), 150, 8, 9, 1)
rests = pytest.mark.parametrize("rest", [None, "renormalize"])
grown = pytest.mark.parametrize("standardize", [False, True])


@kinds
def test_standardised_logits(divergence, beta):
    """The teacher has its own temperature. The logits have a bias, a scale and a softcap."""
    features = {**FEATURES["everything"], "divergence": divergence, "beta": beta}
    problem = make(SMALL, std=2.0, **features)
    check(problem, standardize=True, teacher_temperature=0.6, backend=ROW_KERNEL)


def test_a_large_mean_of_the_logits_costs_no_digits():
    problem = make(SMALL, bias=True)
    for head in (problem.student_head, problem.teacher_head):
        head.bias.data.add_(300.0)
    check(problem, 1e-4, 1e-4, standardize=True, backend=ROW_KERNEL)


@rests
@grown
def test_sparse_targets(rest, standardize):
    problem = make(SMALL, std=2.0, **{**FEATURES["everything"], "temperature": 1.0})
    targets = some_targets(SMALL, 20, rest)
    mask = torch.tensor([False, True])
    check_sparse(problem, targets, ROW_KERNEL, mask=mask, temperature=1.7, standardize=standardize)


@grown
def test_labels_beside_targets_and_a_bound(standardize):
    problem = make(SMALL, std=2.0, bias=True)
    targets, labels = some_targets(SMALL), torch.tensor([0, 149])
    targets.token_ids[:, 0] = targets.token_ids[:, 1] = labels
    given = problem, targets, labels, ROW_KERNEL, 1e-5, standardize
    assert check_beside_labels(*given) == 0.5


def run_pass(monkeypatch, problem, zs, zt, **changes):
    """Run the kernel on a tile of products, and return losses, gradient and gradient statistics."""
    call = capture_call(monkeypatch, problem)
    kernel = RowKernelPass(call, torch.float32, len(zs))
    stride = kernel.layout.grad_stride
    grad, grad_stats = torch.full((len(zs), stride), float("nan")), kernel.grad_stats()
    terms = Terms(call.divergences[0], torch.ones(len(zs)), None, None)
    tiles = [torch.nn.functional.pad(z, (0, 200 - z.shape[1])) for z in (zs, zt)]
    (loss,) = kernel.run(tiles, terms._replace(**changes), grad, grad_stats)
    return loss, grad[:, : zs.shape[1]], grad_stats


def test_rows_of_equal_logits_have_no_gradient(monkeypatch, lanes):
    zs, zt = torch.randn(2, 2, 150)
    zs[0] = 0.1
    loss, grad, _ = run_pass(monkeypatch, make(SMALL), zs, zt, standardized=True)
    assert loss.isfinite().all() and loss[0] > 0
    assert not grad[0].any() and grad[1].any()


def test_the_statistics_describe_the_gradient_at_targets(monkeypatch, lanes):
    zs, zt = torch.randn(2, 2, 150)
    rows = target_rows(some_targets(SMALL, 20), 150, torch.float32)
    _, grad, grad_stats = run_pass(monkeypatch, make(SMALL), zs, zt, targets=rows)
    assert_close(grad_stats.total(), grad.double().abs().sum(), 1e-5)
    assert_close(grad_stats.squares_of_all(), grad.double().square().sum(), 1e-5)
    assert bool((grad_stats.peak >= grad.abs().amax(0)).all())
    listed = torch.zeros_like(grad, dtype=torch.bool).scatter(1, rows.ids, True).any(0)
    assert torch.equal(grad_stats.peak[~listed], grad.abs().amax(0)[~listed])


def test_clusters_leave_these_rows_to_the_other_kernel(monkeypatch):
    problem, targets = make(SMALL), some_targets(SMALL)
    with small_clusters():
        check(problem, standardize=True, backend=ROW_KERNEL)
        check_sparse(problem, targets, ROW_KERNEL)


def test_a_gpu_runs_the_kernel_for_these_features():
    cuda = torch.device("cuda")
    for features in ((), ("SparseTargets", "standardize", "token_clip")):
        assert has_row_kernel(cuda, torch.float32, features)
        # The kernels for a vocabulary over several ranks have none of them.
        assert has_row_kernel(cuda, torch.float32, features, True) == (not features)
    for feature in ("SparseTargets.rest", "label_smoothing", "z_loss"):
        assert not has_row_kernel(cuda, torch.float32, ("SparseTargets", feature))
