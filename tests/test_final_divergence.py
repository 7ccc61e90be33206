"""The final divergence: weighted sums of several divergences, and the adaptive KL ("akl")."""

import pytest
import torch

from lens_kernels import DistillationLoss, LensHead, adaptive, distillation_loss
from reference import adaptive as oracle
from reference import dense
from tests.support.compare import assert_close
from tests.support.grids import BATCH, FEATURES, SHAPES, WITH_SLOW_ROW_KERNEL, Shape, several_chunks
from tests.support.memory import peak_bytes
from tests.support.objectives import check_objective, make_objective, some_labels
from tests.support.problems import capture_call, objective, recorded
from tests.support.refusals import INF, NAN, refused, small_objective

backends = pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
akl = {"final_divergence": "akl"}
BOTH = {"forward_kl": 0.5, "reverse_kl": 2.0}
SUMS = {
    "two": BOTH,
    "one": {"jsd": 0.3},
    "four, one of weight 0": {"jsd": 1, "tvd": 0.0, "hellinger": 2.0, "forward_kl": 0.25},
    "adaptive": {"akl": 1.0},
    "adaptive and others": {"akl": 0.7, "forward_kl": 0.2, "jsd": 1.5},
}


@backends
@pytest.mark.parametrize("final", SUMS)
def test_a_weighted_sum(backend, final):
    options = {"labels": some_labels(), "kd_ratio": 0.4, "beta": 0.2, "lens_coeff": 0.5}
    options |= {"final_divergence": SUMS[final], "room": several_chunks(BATCH)}
    check_objective(make_objective(norm="rms", bias=True), backend=backend, **options)


@backends
@pytest.mark.parametrize("feature", FEATURES)
def test_adaptive_kl(backend, feature):
    options = {"labels": some_labels(), "kd_ratio": 0.6, "room": several_chunks(BATCH, 12)}
    check_objective(make_objective(**FEATURES[feature]), backend=backend, **options, **akl)


@backends
@pytest.mark.parametrize("shape", ["odd", "one_row", "smallest", "wide"])
@pytest.mark.parametrize("room", [1, None])
def test_adaptive_kl_of_any_shape(backend, shape, room):
    """The adaptive KL needs no lens pairs, and gives the same result for any number of chunks."""
    shape = SHAPES[shape]
    shape = Shape(shape.leading, shape.vocab, shape.student, shape.teacher, 0)
    check_objective(make_objective(shape), backend=backend, room=room, **akl)


@backends
def test_adaptive_kl_of_a_prefix_of_the_vocabulary_with_a_mask_and_a_denominator(backend):
    problem = make_objective(norm="layer", bias=True)
    problem.teacher_head = problem.teacher_head.prefix(70)
    options = {"mask": torch.rand(BATCH.leading) < 0.5, "denominator": 11.0}
    options |= {"vocab_size": 60, "temperature": 1.4, "room": several_chunks(BATCH, 8)}
    check_objective(problem, backend=backend, **options, **akl)


def share_of(problem, **options):
    """Return each token's weight of the forward KL in the adaptive KL, as a call computes it."""
    with pytest.MonkeyPatch.context() as patch:
        shares = recorded(patch, adaptive, "head_share")
        objective(problem, **options, **akl)
    ((_, share),) = shares
    return share


def test_masked_rows_are_not_projected_and_the_others_in_chunks(monkeypatch):
    problem = make_objective()
    mask = torch.zeros(BATCH.leading, dtype=torch.bool)
    mask[1:4] = True
    whole = share_of(problem)
    projected = recorded(monkeypatch, adaptive.matmul, "project")
    room = 10 * adaptive.TILES * BATCH.vocab * 4
    share = share_of(problem, mask=mask, workspace_bytes=room, backend="triton")
    assert [args[0].shape[0] for args, _ in projected] == [10, 10, 10, 10, 1, 1]
    assert not share[~mask.flatten()].any()
    assert_close(share[mask.flatten()], whole[mask.flatten()], 1e-6)


def given_probabilities(teacher, student):
    """Return the loss of one token whose models give these probabilities, and its hidden state."""
    heads, states = [], []
    for values in (student, teacher):
        x = torch.tensor([values])
        bias = torch.zeros(len(values)).where(x[0] > 0, -INF)
        heads.append(LensHead(torch.eye(len(values)), bias))
        states.append(x.where(x > 0, 1.0).log())
    finals = {"student_final": states[0].requires_grad_(), "teacher_final": states[1]}
    return distillation_loss([], [], *heads, **finals, **akl).loss, states[0]


# The adaptive KL's "head" is a set of the teacher's most probable entries. It takes entries in
# order of probability while their sum is at most one half. The most probable entry always belongs
# to it.
@pytest.mark.parametrize(
    ("teacher", "student", "head"),
    [
        # The entry 0.4 is in the head. Adding 0.3 would exceed one half.
        ([0.2, 0.4, 0.3, 0.1], [0.1, 0.2, 0.4, 0.3], [1]),
        # The entries 0.23 and 0.22 are in the head. Adding 0.2 would exceed one half.
        ([0.2, 0.15, 0.22, 0.23, 0.2], [0.1, 0.3, 0.2, 0.15, 0.25], [2, 3]),
        # Only 0.3 is in the head. Adding 0.23 would exceed one half, and smaller entries are not
        # tried.
        ([0.04, 0.21, 0.3, 0.22, 0.23], [0.2, 0.3, 0.1, 0.3, 0.1], [2]),
        # The most probable entry, 0.7, is in the head, although it exceeds one half.
        ([0.1, 0.7, 0.2], [0.3, 0.5, 0.2], [1]),
        # The first two entries are in the head, because they sum to exactly one half. Equal entries
        # are taken by index.
        ([0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.2, 0.3], [0, 1]),
    ],
)
def test_the_entry_that_passes_one_half_is_in_the_tail_unless_it_is_the_first(
    teacher, student, head
):
    p, q = (torch.tensor(x).double() for x in (teacher, student))
    assert sorted(oracle.head(p)) == head
    gap = (p - q).abs()
    share = gap[head].sum() / gap.sum()
    expected = share * dense.kl(p, q) + (1 - share) * dense.kl(q, p)
    assert_close(given_probabilities(teacher, student)[0], expected, 1e-6)


def test_a_head_may_have_any_number_of_entries():
    torch.manual_seed(0)
    vocab = 5000
    scales = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 6.0])  # from equal entries to one large entry
    p = (torch.randn(len(scales), vocab) * scales[:, None]).double().softmax(-1)
    p = torch.cat([p, p.round(decimals=4)])  # with many equal entries
    found = adaptive._head(p)
    sizes = found.sum(-1)
    assert sizes.min() == 1 and sizes.max() == vocab // 2
    assert adaptive.LEAST < sizes[2] and adaptive.LEAST * adaptive.GROWTH < sizes[1]
    for row, mask in zip(p, found, strict=True):
        assert set(oracle.head(row)) == set(mask.nonzero()[:, 0].tolist())


@backends
def test_identical_models_are_exactly_zero(backend):
    problem = make_objective(bias=True).imitate()
    assert bool((share_of(problem, backend=backend) == 0.5).all())
    out = objective(problem, backend=backend, **akl)
    assert out.loss == 0 and out.kd == 0
    assert not any(g.any() for g in problem.gradients(out.loss).values())


def test_entries_of_probability_zero_have_no_effect():
    loss, student = given_probabilities([0.6, 0.4, 0.0], [0.2, 0.8, 0.0])
    expected, fewer = given_probabilities([0.6, 0.4], [0.2, 0.8])
    assert_close(loss, expected, 1e-6)
    (grad,), (truth,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, fewer)
    assert_close(grad[:, :2], truth, 1e-6)
    assert grad[0, 2] == 0


def test_adaptive_kl_in_float64():
    problem = make_objective(**FEATURES["everything"]).to(torch.float64)
    out = check_objective(problem, 1e-13, room=several_chunks(BATCH, 16), **akl)
    assert out.loss.dtype is torch.float64


@pytest.mark.parametrize("double", ["student", "teacher"])
def test_adaptive_kl_with_float64_on_one_side(double):
    check_objective(make_objective().to(torch.float64, double), 2e-7, **akl)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("narrow", [("student",), ("teacher",), ("student", "teacher")])
def test_adaptive_kl_in_16_bit(backend, narrow, dtype):
    problem = make_objective(bias=True).to(dtype, *narrow)
    rounding = 1e-2 if "student" in narrow else 1e-4
    check_objective(problem, 1e-5, rounding, backend=backend, **akl)


@backends
def test_autocast_rounds_the_operands_of_the_share(backend):
    problem = make_objective()
    rounded = problem.to(torch.bfloat16).to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = objective(problem, backend=backend, **akl)
        share = share_of(problem, backend=backend)
        left_alone = share_of(rounded)
    assert_close(out.loss, objective(rounded, **akl).loss, 1e-5)
    assert_close(share, share_of(rounded), 1e-5)
    assert torch.equal(left_alone, share_of(rounded)), "autocast changed float64"


def test_the_share_fills_its_workspace_and_no_more(monkeypatch):
    problem = make_objective(Shape((1024,), 4099, 16, 16, 0), bias=True, softcap=4.0)
    head_share = adaptive.head_share
    calls = recorded(monkeypatch, adaptive, "head_share")
    objective(problem, backend="torch", workspace_bytes=2**23, **akl)
    peak = peak_bytes(lambda: head_share(*calls[0][0]))
    assert 2**22 < peak < 2**23 + 2**19


@pytest.mark.parametrize(
    ("final", "kinds"),
    [
        ("tvd", ["tvd"]),
        ("akl", ["forward_kl", "reverse_kl"]),
        (
            {"akl": 1.0, "forward_kl": 1.0, "tvd": 0.0, "jsd": 1.0},
            ["forward_kl", "reverse_kl", "jsd"],
        ),
    ],
)
def test_each_divergence_enters_once_and_the_share_is_made_where_needed(monkeypatch, final, kinds):
    shares = recorded(monkeypatch, adaptive, "head_share")
    options = {"labels": some_labels(), "final_divergence": final}
    call = capture_call(monkeypatch, make_objective(norm="rms"), whole=True, **options)
    assert [d.value for d in call.divergences] == ["jsd", "jsd", *kinds]
    assert call.normed == (True, True) + (False,) * len(kinds)
    assert call.row_weight.shape[0] == len(kinds) + 3
    assert len(shares) == (final != "tvd")


WRONG = {
    "no mapping": (["jsd"], TypeError, ["string", "mapping of names to weights", "list"]),
    "unknown": ("kl", ValueError, ["'kl'", "'jsd'", "'akl'", "mapping of names to weights"]),
    "empty": ({}, ValueError, ["empty mapping", "above 0"]),
    "unknown in it": ({"jsd": 1, "kl": 1.0}, ValueError, ["'kl'", "'forward_kl'", "'akl'"]),
    "unknown of no weight": ({"jsd": 1, "kl": 0.0}, ValueError, ["'kl'", "'forward_kl'"]),
    "no name": ({1: 1.0}, TypeError, ["name in", "string", "int"]),
    "negative": ({"jsd": 1.0, "tvd": -0.1}, ValueError, ["['tvd']", "-0.1", "[0, inf]"]),
    "nan": ({"jsd": NAN}, ValueError, ["['jsd']", "nan", "finite"]),
    "infinite": ({"akl": INF}, ValueError, ["['akl']", "inf", "finite"]),
    "no number": ({"jsd": "1"}, TypeError, ["['jsd']", "number", "str"]),
    "all zero": ({"jsd": 0, "akl": 0.0}, ValueError, ["'jsd': 0", "above 0", "give"]),
}


@pytest.mark.parametrize("function", [small_objective, DistillationLoss])
@pytest.mark.parametrize("case", WRONG)
def test_invalid_final_divergences_are_refused(function, case):
    value, error, words = WRONG[case]
    refused(error, ["final_divergence", *words], function, final_divergence=value)


def test_the_share_is_computed_after_all_checks(monkeypatch):
    monkeypatch.setattr(adaptive, "head_share", lambda *args: 1 / 0)
    for options in ({"beta": 1.0}, {"temperature": 0}, {"workspace_bytes": 0}):
        refused(ValueError, [*options], small_objective, **akl, **options)
    wide = torch.randn(3, 5)
    refused(ValueError, ["student_final has width 5"], small_objective, student_final=wide, **akl)
