"""The kernels' sums over the vocabulary are exact and repeatable, and rows are independent."""

import importlib

import pytest
import torch

from lens_kernels import LensHead, symmetric_lens_loss
from lens_kernels.backends.triton.kernels import launch
from lens_kernels.backends.triton.tiles import sizes
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import BATCH, DIVERGENCES, FEATURES, Shape
from tests.support.memory import fill_new_tensors
from tests.support.problems import check, loss_of, make, oracle, ours, without_columns

# The kernels divide this shape into two row blocks and four splits of the vocabulary. Each split
# has two tiles, except that the last split has a partial tile.
SPLITS = Shape((65,), 840, 24, 40, 1)
# Before the gradients, the kernels sweep the vocabulary twice for jsd, and once for jeffreys.
PATHS = ["jsd", "jeffreys"]
INFINITY = float("inf")


@pytest.fixture
def layout():
    """Check that the kernels divide SPLITS into two row blocks and four vocabulary splits."""
    tile = sizes.default(sizes.Sweep.ONLINE_KL, sizes.ARCHS["interpreter"], torch.float32, 24)
    grid = launch.SplitGrid(SPLITS.tokens, SPLITS.vocab, tile, torch.device("cpu"))
    assert grid.shape == (8,) and (grid.splits, grid.tiles_per_split) == (4, 2)
    assert (tile.block_n, tile.block_v) == (64, 128)


def rows(problem, **options):
    return loss_of(symmetric_lens_loss, problem, reduction="none", backend="triton", **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_near_convergence(layout, divergence):
    """Near convergence, sums over the vocabulary keep their digits.

    All logits are multiples of 2^-16 below 64, which float32 represents exactly. So every error is
    an error of the sums.
    """
    fine, coarse = 2.0**-12, 2.0**-4
    student = (torch.randn(SPLITS.tokens, 16) / fine).round() * fine
    teacher = student + (3 * torch.randn(SPLITS.tokens, 16)).round() * fine
    weight = (torch.rand(SPLITS.vocab, 16) / coarse).round() * coarse
    bias = torch.full((SPLITS.vocab,), 50.0)
    problem = make(SPLITS, divergence=divergence)
    problem.student_hidden, problem.teacher_hidden = [student.requires_grad_()], [teacher]
    problem.student_head, problem.teacher_head = LensHead(weight), LensHead(weight, bias)
    expected, _ = oracle(problem, reduction="none")
    got = rows(problem)
    assert divergence == "tvd" or 1e-8 < expected.mean() < 2e-6
    assert_close(got.mean(), expected.mean(), 1e-4)
    assert_close(got, expected, 1e-3)
    assert bool((got > 0).all())


CLOSED = {
    "the first and the last split": [*range(0, 256), *range(768, 840)],
    "the first tile of a split": range(256, 384),
    "the last tile of a split": range(384, 512),
    "all but one tile": [*range(0, 384), *range(512, 840)],
    "all but the last entry": range(0, 839),
}


@pytest.mark.parametrize("divergence", PATHS)
@pytest.mark.parametrize("where", CLOSED)
def test_tiles_and_splits_at_minus_infinity_in_both_models(layout, where, divergence):
    """Removing vocabulary entries that are -inf in both models does not change the result."""
    closed = torch.zeros(SPLITS.vocab, dtype=torch.bool)
    closed[list(CLOSED[where])] = True
    problem = make(SPLITS, std=3.0, bias=True, divergence=divergence)
    problem, truth = without_columns(problem, closed)
    loss, grads = ours(problem, backend="triton")
    if where == "all but the last entry":
        assert loss == 0 and not grads["hidden0"].any()
        return
    expected, expected_grads = oracle(truth)
    assert_close(loss, expected, 1e-6)
    for name in ("weight", "bias"):
        grads[name] = grads[name][~closed]
    assert_gradients(grads, expected_grads, 1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("where", ["the last tile of a split", "the first and the last split"])
def test_an_infinite_tile_without_mass_does_not_count(layout, where, divergence):
    """A tile adds nothing to a KL if its first distribution is 0 everywhere in the tile.

    This also holds if the second distribution is 0 at an entry of the tile.
    """
    problem = make(SPLITS, std=3.0, bias=True, divergence=divergence)
    other, weighing = problem.args()[2:]
    if divergence == "reverse_kl":
        other, weighing = weighing, other
    with torch.no_grad():
        weighing.bias[list(CLOSED[where])] = -INFINITY
        other.bias[CLOSED[where][5]] = -INFINITY
    expected, _ = oracle(problem)
    loss, grads = ours(problem, backend="triton")
    assert_close(loss, expected, 1e-6)
    assert all(bool(g.isfinite().all()) for g in grads.values()) and bool(grads["hidden0"].any())


@pytest.mark.parametrize("divergence", PATHS)
@pytest.mark.parametrize("peaks", [(5, 839), (839, 5), (280, 500), (127, 128)])
def test_models_that_peak_in_different_tiles(layout, peaks, divergence):
    problem = make(SPLITS, std=1.0, bias=True, divergence=divergence)
    heads = problem.student_head, problem.teacher_head

    def peak(*heights):
        with torch.no_grad():
            for head, at, height in zip(heads, peaks, heights, strict=True):
                head.bias[at] = height

    peak(6.0, 7.0)
    check(problem, backend="triton")
    # Logits of 30 to 35 make gradients underflow, so only the loss is compared.
    peak(30.0, 35.0)
    expected, _ = oracle(problem)
    assert_close(loss_of(symmetric_lens_loss, problem, backend="triton"), expected, 3e-6)


@pytest.mark.parametrize("divergence", PATHS)
@pytest.mark.parametrize("processors", [1, 100])
def test_the_number_of_splits_does_not_matter(monkeypatch, processors, divergence):
    """One split of all seven tiles is as accurate as seven splits of one tile."""
    problem = make(SPLITS, std=3.0, **FEATURES["everything"], divergence=divergence)
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    check(problem, backend="triton")


@pytest.mark.parametrize("divergence", PATHS)
@pytest.mark.parametrize("blocks", [(16, 32, 64), (32, 16, 32), (128, 128, 16)])
def test_the_tile_does_not_matter(monkeypatch, blocks, divergence):
    """Kernels with any block sizes give right results.

    The hidden sizes 33 and 17 are padded to 48 and 32. A step of 64 reads beyond both padded sizes,
    and a step of 32 beyond 48.
    """
    problem = make(Shape((17,), 50, 33, 17, 1), std=3.0, **FEATURES["everything"])
    module = importlib.import_module("lens_kernels.backends.triton.evaluate")
    monkeypatch.setattr(module, "tile_for", lambda *a, **k: launch.Tile(*blocks, 4, 1))
    check(problem, backend="triton", divergence=divergence)


@pytest.mark.parametrize("divergence", PATHS)
def test_results_repeat_bit_for_bit_on_any_uninitialised_memory(monkeypatch, divergence):
    problem = make(SPLITS, **FEATURES["everything"], divergence=divergence)
    # The workspace has room for three tiles, so the seven tiles make chunks of 3, 3 and 1.
    options = {"backend": "triton", "workspace_bytes": 65 * 128 * 4 * 3}
    loss, grads = ours(problem, **options)
    for garbage in (1e30, float("nan")):
        with monkeypatch.context() as patch:
            fill_new_tensors(patch, garbage)
            again, grads_again = ours(problem, **options)
        assert torch.equal(loss, again)
        for name, grad in grads.items():
            assert grad.any() and torch.equal(grad, grads_again[name]), name


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(divergence, side):
    problem = make(Shape((40,), 97, 33, 17, 1), **FEATURES["everything"], divergence=divergence)
    clean = rows(problem).detach()
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[0, 13, 39]] = True
    with torch.no_grad():
        getattr(problem, f"{side}_hidden")[0][bad, 5] = float("nan")
    got = rows(problem)
    grad = problem.gradients(got.sum())["hidden0"]
    assert bool(got[0, bad].isnan().all())
    assert torch.equal(got[0, ~bad], clean[0, ~bad])
    assert bool(grad[~bad].isfinite().all()) and bool(grad[~bad].any())
    if side == "student":
        assert bool(grad[bad].isnan().any(-1).all())


@pytest.mark.parametrize("infinite", [INFINITY, -INFINITY])
def test_an_infinite_hidden_state_gives_nan_in_its_row_alone(infinite):
    """Softmax gives NaN for +inf."""
    problem = make(BATCH)
    with torch.no_grad():
        problem.student_hidden[0][2, 3] = infinite
    for backend in ("torch", "triton"):
        loss = loss_of(symmetric_lens_loss, problem, reduction="none", backend=backend)
        wrong = torch.zeros(loss.shape, dtype=torch.bool)
        wrong[0, 2, 3] = True
        assert torch.equal(loss.isnan(), wrong), backend
