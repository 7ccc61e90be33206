"""The torch backend keeps its peak memory below a bound, and rarely makes the host wait.

A call has ``L`` pairs of ``N`` tokens, hidden sizes ``D_s`` and ``D_t``, and ``V`` entries. The
bound, in bytes, is the sum of these terms:

    workspace_bytes                      the two tiles of logits
  + TEMPORARIES * 4 * 2^18               temporaries for blocks of 2^18 logits
  + 4 * (L N D_s + V D_s)                the gradients, float32
  + OTHER * 4 * R (D_s + D_t)            a chunk of R rows: operands and results of GEMMs
  + SMALL * 4 * L N                      per-token losses, weights, and their sums
"""

import math

import pytest
import torch

from lens_kernels import SparseTargets, adaptive, symmetric_lens_loss
from lens_kernels.backends import head_products, matmul
from lens_kernels.backends.torch import pointwise_pass, row_chunks
from lens_kernels.backends.torch.layout import row_stride
from lens_kernels.dispatch import Backend
from tests.support.grids import BATCH, DIVERGENCES, FEATURES, Shape, several_chunks
from tests.support.memory import MIB, peak_bytes, peak_of
from tests.support.objectives import make_objective
from tests.support.operators import Watch
from tests.support.problems import capture_call, make, ours, recorded

TEMPORARIES, OTHER, SMALL = 16, 8, 8


@pytest.fixture
def eager(monkeypatch):
    """Run the pointwise pass without compilation, because the bound is for the uncompiled pass."""
    monkeypatch.setattr(pointwise_pass, "CPU_COMPILE_LOGITS", float("inf"))


def test_the_measurement_counts_temporaries_and_freed_memory():
    x = torch.zeros(2**20)
    assert 8 * MIB <= peak_bytes(lambda: (x + 1) * 2 + 1) < 9 * MIB
    assert 12 * MIB <= peak_bytes(lambda: (x + 1, x + 2, x + 3)) < 13 * MIB
    assert peak_bytes(lambda: torch.softmax(x.view(1024, 1024).t(), -1)) >= 8 * MIB


def bound(shape, workspace):
    rows = min(shape.tokens, workspace // (8 * shape.vocab))
    return (
        workspace
        + TEMPORARIES * 4 * 2**18
        + 4 * (shape.pairs * shape.tokens * shape.student + shape.vocab * shape.student)
        + OTHER * 4 * rows * (shape.student + shape.teacher)
        + SMALL * 4 * shape.pairs * shape.tokens
    )


def test_rows_of_a_tile_begin_at_cache_lines(monkeypatch):
    tiles = recorded(monkeypatch, matmul, "project")
    call = capture_call(monkeypatch, make(Shape((30,), 501, 8, 8, 1)))
    with torch.no_grad():
        row_chunks.evaluate(call)
    strides = [args[-1].stride() for args, _ in tiles]
    # A row of 501 logits takes 33 cache lines of 16 logits, because the number of lines must be
    # odd.
    assert strides == 2 * [(528, 1)]


# All logits of one model and one lens pair would take 32 MiB.
LARGE = Shape((2048,), 4099, 32, 48, 2)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("divergence", "feature"), [*((d, "everything") for d in DIVERGENCES), ("jsd", "plain")]
)
def test_peak_memory_is_bounded(monkeypatch, feature, divergence):
    workspace = 4 * MIB
    problem = make(LARGE, **FEATURES[feature], divergence=divergence)
    peak = peak_of(monkeypatch, problem, workspace_bytes=workspace)
    assert peak >= workspace / 2, "the measurement missed the tiles"
    assert peak <= bound(LARGE, workspace) < 8 * LARGE.tokens * LARGE.vocab


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", ["standardize", "ghost", "uniform", "teachers"])
def test_peak_memory_of_variants_is_bounded(monkeypatch, kind):
    workspace, options = 4 * MIB, {"standardize": kind == "standardize"}
    problem = make(LARGE, divergence="forward_kl")
    if kind == "teachers":
        head = problem.teacher_head
        problem.teacher_head = [head, head.map(torch.clone)]
    elif kind != "standardize":
        p, ids = torch.rand(LARGE.tokens, 50).softmax(-1), torch.arange(50).expand(2048, -1)
        problem.teacher_hidden, problem.teacher_head = SparseTargets(ids, p / 2, kind), None
    peak = peak_of(monkeypatch, problem, workspace_bytes=workspace, **options)
    assert workspace / 4 <= peak <= bound(LARGE, workspace) < 8 * LARGE.tokens * LARGE.vocab


@pytest.mark.usefixtures("eager")
def test_the_tiles_fill_the_workspace(monkeypatch):
    """The tiles fill 75 to 100 % of the workspace, whose size does not change other memory."""
    rest = []
    for workspace in (4 * MIB, 12 * MIB, 20 * MIB):
        row = 8 * row_stride(LARGE.vocab)
        most_rows = workspace // row
        rows = math.ceil(LARGE.tokens / math.ceil(LARGE.tokens / most_rows))
        assert 0.75 * workspace <= row * rows <= workspace
        peak = peak_of(monkeypatch, make(LARGE), workspace_bytes=workspace)
        rest.append(peak - row * rows)
    assert max(rest) - min(rest) < MIB


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("labelled", [False, True])
def test_twice_the_tokens_add_only_terms_of_hidden_size(monkeypatch, labelled):
    peaks, pairs = [], 2
    for tokens in (1024, 2048):
        problem = make_objective(Shape((tokens,), 4099, 32, 48, pairs - 1))
        options = {"workspace_bytes": 4 * MIB}
        if labelled:
            options |= {"labels": torch.zeros(tokens, dtype=torch.long), "kd_ratio": 0.5}
        peaks.append(peak_of(monkeypatch, problem, whole=labelled, **options))
    growth, more = peaks[1] - peaks[0], 1024 * 4
    assert more * pairs * 32 <= growth <= more * (pairs * 32 + SMALL * (pairs + labelled)) + MIB
    assert growth < more * 4099 / 8


@pytest.mark.usefixtures("eager")
def test_16_bit_heads_are_not_copied(monkeypatch):
    """16-bit heads are converted to float32 tile by tile. Whole copies would take 24 MiB."""
    problem = make(Shape((64,), 8192, 256, 512, 1))
    dtypes = torch.float32, torch.bfloat16
    wide, narrow = (peak_of(monkeypatch, problem.to(dtype)) for dtype in dtypes)
    assert 8 * MIB < narrow <= wide + 4 * MIB


def test_a_frozen_head_and_no_gradient_need_no_buffers(monkeypatch):
    shape = Shape((64,), 20011, 96, 96, 1)
    head_bytes = 4 * shape.vocab * shape.student

    def peak(*wanted):
        return peak_of(monkeypatch, make(shape).freeze(*wanted), workspace_bytes=16 * shape.vocab)

    full, frozen, nothing = peak("hidden0", "weight"), peak("hidden0"), peak()
    assert full - frozen >= 0.95 * head_bytes
    assert frozen < head_bytes + bound(Shape((64,), 20011, 96, 96, 0), 16 * shape.vocab)
    assert nothing <= frozen


def test_active_entries_are_gathered_few_at_a_time(always_active, monkeypatch):
    """Copying all active entries and their head rows at once would take 15 MiB more."""
    shape, entries = Shape((64,), 20011, 96, 96, 1), head_products.CPU_ACTIVE_TILE
    exact, active = (
        peak_of(monkeypatch, make(shape), grad_threshold=threshold) for threshold in (None, 0.0)
    )
    grad_stats = 4 * shape.vocab * 8
    assert 0 < active - exact <= 4 * entries * 2 * (64 + 96) + grad_stats < 6 * MIB


@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_of_tokens_by_vocabulary(monkeypatch, masked):
    shape = Shape((300,), 501, 8, 8, 2)
    problem = make(shape, **FEATURES["everything"])
    mask = torch.ones(300) if masked else None
    call = capture_call(monkeypatch, problem, mask=mask, workspace_bytes=several_chunks(shape, 30))
    with Watch() as watch, torch.no_grad():
        row_chunks.evaluate(call)
    assert watch.largest == 30 * row_stride(501), "the tiles must be the largest tensors"


SYNCHRONISING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "_to_cpu"}
SYNCHRONISING |= {"masked_select", "unique", "_unique2", "bincount", "repeat_interleave"}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_the_host_synchronises_only_once_for_a_mask(monkeypatch, feature, labelled, masked):
    shape = Shape((4, 9), 61, 8, 8, 1)
    problem = make_objective(shape, **FEATURES[feature])
    options = {"mask": torch.rand(shape.leading) < 0.5} if masked else {}
    options["workspace_bytes"] = 8 * 61 * 5
    if labelled:
        options |= {"labels": torch.zeros(shape.leading).long(), "kd_ratio": 0.5}
    call = capture_call(monkeypatch, problem, whole=labelled, **options)
    with Watch() as watch, torch.no_grad():
        row_chunks.evaluate(call)
    waits = [name for name in watch.names if name in SYNCHRONISING]
    # A call with labels has a mask, which selects the positions that have a label.
    assert waits == (["nonzero"] if masked or labelled else [])


def test_the_watch_sees_a_synchronisation():
    with Watch() as watch:
        x = torch.ones(3)
        x.sum().item(), x.nonzero()
    assert [n for n in watch.names if n in SYNCHRONISING] == ["_local_scalar_dense", "nonzero"]


def test_the_backward_pass_never_synchronises():
    problem = make(Shape((9,), 61, 8, 8, 2), **FEATURES["everything"])
    loss = symmetric_lens_loss(*problem.args())
    with Watch() as watch:
        problem.gradients(2 * loss)
    assert watch.names and not SYNCHRONISING.intersection(watch.names)


def test_out_of_memory_names_the_option_that_limits_it(monkeypatch):
    """The allocator's message comes before the option, because trainers search for this message."""

    def evaluate(self, call):
        return torch.empty(1 << 60, dtype=torch.uint8)

    problem = make(BATCH)
    monkeypatch.setattr(Backend, "evaluate", evaluate)
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)can't allocate memory.*") as caught:
        ours(problem, workspace_bytes=3 << 20)
    assert "may take workspace_bytes=3145728 (3 MiB): pass a smaller" in str(caught.value)
    monkeypatch.setattr(Backend, "evaluate", lambda self, call: [][0])
    with pytest.raises(IndexError):
        ours(problem)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_search_for_a_head_fits_in_its_tiles(scale):
    """The scale sets how many entries the adaptive KL searches: all of them if they are equal."""
    torch.manual_seed(0)
    shape = (64, 16384)  # 4 MiB
    logits = torch.randn(shape) * scale, torch.randn(shape)

    def weight():
        return adaptive.share_of(adaptive._probabilities(iter(logits), None), None)

    # at least one tile is left for the memory that only GPUs need
    assert 5 * 4 * MIB <= peak_bytes(weight) <= (adaptive.TILES - 1) * 4 * MIB
