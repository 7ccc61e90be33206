"""Kernels read and write only inside their tensors, at odd sizes, strides and offsets."""

import pytest
import torch

from lens_kernels.backends.triton.kernels.operands import ALIGNMENT, aligned, padded
from tests.support.grids import BATCH, FEATURES, Shape
from tests.support.memory import fill_new_tensors
from tests.support.objectives import solve_objective
from tests.support.problems import check, make, oracle, ours

NAN = float("nan")
# Matrices of width 32 are read in place. Matrices of width 33 are first copied to padded rows.
WIDTHS = [32, 33]


@pytest.fixture
def garbage(monkeypatch):
    fill_new_tensors(monkeypatch, NAN)


def rows_inside(x, before, after):
    """Return an uninitialised view of ``x``'s shape. The buffer around it is filled with NaN."""
    tokens, width = x.shape[:-1].numel(), x.shape[-1]
    rows = torch.full((tokens + 2, before + width + after), NAN)
    return rows[1:-1, before : before + width].unflatten(0, x.shape[:-1])


def padded_rows(x):
    """Return uninitialised rows whose stride and offset allow vector loads."""
    return rows_inside(x, 16, 16)


def far_rows(x):
    """Return uninitialised rows whose stride and offset rule out vector loads."""
    return rows_inside(x, 3, 20)


def transposed(x):
    """Return an uninitialised transposed tensor, whose first axis has stride 1."""
    return torch.empty(x.shape[::-1]).permute(*reversed(range(x.dim())))


def every_other(x):
    """Return every other entry of a buffer of NaN, so that no axis has stride 1."""
    return torch.full((*x.shape[:-1], 2 * x.shape[-1]), NAN)[..., ::2]


def offset(x):
    """Return a contiguous view in the middle of a buffer of NaN."""
    return torch.full((x.numel() + 7,), NAN)[5:-2].view(x.shape)


def laid_out(problem, layout):
    """Return a copy of the problem.

    The function ``layout`` creates the memory for each tensor of two or more axes.
    """

    def move(x):
        if x.dim() == 1:
            view = every_other(x) if layout is not offset else offset(x)
        else:
            view = layout(x)
        view.copy_(x.detach())
        return view.requires_grad_(x.requires_grad)

    return problem.map(move)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature", ["bias", "everything"])
@pytest.mark.parametrize("layout", [padded_rows, far_rows, transposed, every_other, offset])
def test_layouts(garbage, layout, feature, masked, width):
    problem = make(Shape((5, 7), 97, width, 48, 1), std=2.0, **FEATURES[feature])
    options = {"mask": torch.rand(5, 7) < 0.5} if masked else {}
    moved = laid_out(problem, layout)
    assert layout is offset or not moved.student_head.weight.is_contiguous()
    check(moved, truth=problem, backend="triton", **options)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 32])
@pytest.mark.parametrize("layout", [padded_rows, far_rows, transposed, every_other, offset, None])
def test_aligned_copies_only_unaligned_rows(layout, width):
    x = torch.randn(5, width)
    view = x if layout is None else layout(x).copy_(x)
    rows = aligned(view)
    assert torch.equal(rows, x)
    assert rows.stride(1) == 1 and rows.stride(0) % ALIGNMENT == 0
    wide = rows.as_strided((5, padded(width)), rows.stride())
    assert not wide[:, width:].any()
    if width % ALIGNMENT == 0 and layout in (padded_rows, None):
        assert rows.data_ptr() == view.data_ptr(), "aligned rows were copied"


def test_a_row_repeated_by_a_stride_of_zero():
    problem = make(Shape((6,), 61, 32, 48, 1))
    row = problem.teacher_hidden[0][:1].expand(6, 48)
    assert row.stride(0) == 0
    problem.teacher_hidden = [row]
    check(problem, backend="triton")


SIZES = {
    "one token": Shape((1,), 97, 33, 48, 1),
    "one entry": Shape((5,), 1, 33, 48, 1),
    "two entries": Shape((5,), 2, 33, 48, 1),
    "a tile": Shape((64,), 128, 16, 16, 1),
    "a tile and one": Shape((65,), 129, 17, 17, 1),
    "two tiles less one": Shape((127,), 255, 31, 31, 1),
    "width 1": Shape((5,), 9, 1, 2, 1),
    "narrow": Shape((5,), 9, 8, 3, 1),
    "wide": Shape((3,), 9, 300, 257, 1),
}


@pytest.mark.parametrize(
    ("divergence", "norm"), [("jsd", "layer"), ("reverse_kl", None), ("reverse_kl", "rms")]
)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(garbage, size, divergence, norm):
    """Kernels read no uninitialised memory, for sizes below, at and just above one block."""
    problem = make(SIZES[size], bias=True, norm=norm, divergence=divergence)
    if size == "one entry":
        loss, grads = ours(problem, backend="triton")
        assert loss == 0 and not any(g.any() for g in grads.values())
        return
    # A layer norm of width 1 always gives 0, so it passes no gradient.
    none = ("hidden0", "weight", "norm_weight") if (size, norm) == ("width 1", "layer") else ()
    check(problem, zero=none, backend="triton")
    assert not any(oracle(problem)[1][name].any() for name in none)


@pytest.mark.parametrize("divergence", ["jsd", "forward_kl"])
def test_an_upstream_gradient_in_any_layout(divergence):
    problem = make(BATCH, divergence=divergence)
    for upstream in (torch.randn(5, 7, 2).permute(2, 0, 1), torch.randn(2, 5, 14)[..., ::2]):
        assert upstream.shape == (BATCH.pairs, *BATCH.leading)
        # The op flattens the upstream gradient like this, without a copy.
        flat = upstream.reshape(BATCH.pairs, -1)
        assert flat.stride(1) != 1 and flat.data_ptr() == upstream.data_ptr()
        check(problem, upstream=upstream, reduction="none", backend="triton")


def test_labels_and_mask_in_any_layout():
    problem = make(BATCH, std=2.0)
    labels = torch.randint(BATCH.vocab, BATCH.leading)
    mask = torch.rand(BATCH.leading) < 0.5

    options = {"kd_ratio": 0.5, "backend": "triton"}
    expected, expected_grads = solve_objective(problem, labels=labels, mask=mask, **options)
    for spread in (
        lambda x: torch.stack([x, torch.zeros_like(x)], -1)[..., 0],
        lambda x: x.t().contiguous().t(),
    ):
        moved = spread(labels), spread(mask)
        assert not any(x.is_contiguous() for x in moved)
        got, grads = solve_objective(problem, labels=moved[0], mask=moved[1], **options)
        assert torch.equal(got.loss, expected.loss)
        assert all(torch.equal(grads[name], g) for name, g in expected_grads.items())
