"""The final divergence as a weighted sum of several, and the adaptive KL."""

import copy

import pytest
import torch

from lens_kernels import DistillationLoss, LensHead, adaptive, distillation_loss
from reference import adaptive as oracle
from reference import dense
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import BACKENDS, BATCH, FEATURES, SHAPES, Shape, several_chunks
from tests.support.problems import capture_call
from tests.test_distillation import Distillation, expected_terms
from tests.test_inputs import INF, NAN, objective, refused
from tests.test_memory import peak_bytes

backends = pytest.mark.parametrize("backend", BACKENDS)
BOTH = {"forward_kl": 0.5, "reverse_kl": 2.0}
SUMS = {
    "two": BOTH,
    "one": {"jsd": 0.3},
    "four, one of them off": {"jsd": 1, "tvd": 0.0, "hellinger": 2.0, "forward_kl": 0.25},
    "adaptive": {"akl": 1.0},
    "adaptive and others": {"akl": 0.7, "forward_kl": 0.2, "jsd": 1.5},
}


def truth_of(problem, weights, **options):
    """The objective with its final term put together by the oracles: loss and ``kd``."""
    known = expected_terms(problem, **problem.options, **options)
    options = {**problem.options, **options}
    temperature, vocab = options.get("temperature", 1.0), options.get("vocab_size")
    s, t, s_head, t_head = problem.args()
    p = dense.softmax(dense.lens_logits(t[-1], t_head, False, vocab).detach() / temperature)
    q = dense.softmax(dense.lens_logits(s[-1], s_head, False, vocab) / temperature)
    labels, mask = options.get("labels"), options.get("mask")
    if mask is None:
        mask = torch.ones(p.shape[:-1]) if labels is None else labels != -100
    kd = torch.zeros((), dtype=torch.float64)
    for name, weight in weights.items():
        beta = options.get("beta", 0.5)
        rows = oracle.adaptive_kl(p, q) if name == "akl" else dense.divergence(name, p, q, beta)
        kd = kd + weight * (rows * mask).sum() / options.get("denominator", max(1, mask.sum()))
    return known["loss"] + options.get("kd_ratio", 1.0) * (kd - known["kd"]), kd, known


def check(problem, final, *, tolerance=1e-6, zero=(), backend="torch", room=None, **options):
    twin = problem.double()
    weights = {final: 1.0} if isinstance(final, str) else final
    loss, kd, known = truth_of(twin, weights, **options)
    out = problem.call(final_divergence=final, backend=backend, workspace_bytes=room, **options)
    assert_close(out.loss, loss, tolerance, "loss")
    assert_close(out.kd, kd, tolerance, "kd")
    if known["ce"] is not None:
        assert_close(out.ce, known["ce"], tolerance, "ce")
    if known["per_layer"]:
        assert_close(out.per_layer, torch.stack(known["per_layer"]), tolerance, "per_layer")
    expected = twin.gradients(loss)
    expected = {k: torch.zeros(1) if g is None else g for k, g in expected.items()}
    assert_gradients(problem.gradients(out.loss), expected, 10 * tolerance, zero)
    return out


@backends
@pytest.mark.parametrize("final", SUMS)
def test_a_weighted_sum(backend, final):
    problem = Distillation.make(norm="rms", bias=True)
    options = {"labels": problem.labels, "kd_ratio": 0.4, "beta": 0.2, "lens_coeff": 0.5}
    check(problem, SUMS[final], backend=backend, room=several_chunks(BATCH), **options)


@backends
@pytest.mark.parametrize("feature", FEATURES)
def test_adaptive_kl(backend, feature):
    problem = Distillation.make(**FEATURES[feature])
    options = {"labels": problem.labels, "kd_ratio": 0.6}
    check(problem, "akl", backend=backend, room=several_chunks(BATCH, 12), **options)


@backends
@pytest.mark.parametrize("shape", ["odd", "one_row", "smallest", "wide"])
def test_adaptive_kl_of_any_shape(backend, shape):
    """Without lens pairs, in chunks of one row and all at once."""
    shape = SHAPES[shape]
    problem = Distillation.make(Shape(shape.leading, shape.vocab, shape.student, shape.teacher, 0))
    for room in (1, None):
        check(problem, "akl", backend=backend, room=room)


@backends
def test_adaptive_kl_of_a_prefix_of_the_vocabulary(backend):
    problem = Distillation.make(bias=True)
    head = problem.teacher_head
    problem.teacher_head = LensHead(head.weight[:70], head.bias[:70])
    check(problem, "akl", backend=backend, vocab_size=60, temperature=1.4)


@backends
def test_adaptive_kl_with_a_mask_and_a_denominator(backend):
    problem = Distillation.make(norm="layer")
    mask = torch.rand(BATCH.leading) < 0.5
    options = {"mask": mask, "denominator": 11.0, "final_divergence": "akl", "backend": backend}
    room = several_chunks(BATCH, 8)
    check(problem, "akl", backend=backend, room=room, mask=mask, denominator=11.0)
    clean = problem.call(workspace_bytes=room, **options)
    grads = problem.gradients(clean.loss)
    with torch.no_grad():
        for h in problem.student_hidden + problem.teacher_hidden:
            h[~mask] = float("nan")
    dirty = problem.call(workspace_bytes=room, **options)
    assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True) if a is not None)
    for name, grad in problem.gradients(dirty.loss).items():
        assert torch.equal(grad, grads[name])


def share_of(problem, **options):
    """The head share that a call makes, ``(N,)``."""
    shares = []

    def keep(*args):
        shares.append(head_share(*args))
        return shares[-1]

    head_share = adaptive.head_share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "head_share", keep)
        problem.call(final_divergence="akl", **options)
    return shares[0]


def test_masked_rows_are_not_projected_and_the_others_in_chunks(monkeypatch):
    sizes = []
    project = adaptive.matmul.project

    def counted(x, weight, out):
        sizes.append(x.shape[0])
        project(x, weight, out)

    problem = Distillation.make()
    mask = torch.zeros(BATCH.leading, dtype=torch.bool)
    mask[1:4] = True
    whole = share_of(problem)
    monkeypatch.setattr(adaptive.matmul, "project", counted)
    room = 10 * adaptive.TILES * BATCH.vocab * 4
    share = share_of(problem, mask=mask, workspace_bytes=room, backend="triton")
    assert sizes == [10, 10, 10, 10, 1, 1]
    assert not share[~mask.flatten()].any()
    assert_close(share[mask.flatten()], whole[mask.flatten()], 1e-6)


def given_probabilities(teacher, student):
    """The loss of one token whose distributions are these, and the student's hidden state."""
    heads, states = [], []
    for values in (student, teacher):
        x = torch.tensor([values])
        heads.append(
            LensHead(torch.eye(len(values)), torch.zeros(len(values)).where(x[0] > 0, -INF))
        )
        states.append(x.where(x > 0, 1.0).log())
    finals = {"student_final": states[0].requires_grad_(), "teacher_final": states[1]}
    return distillation_loss([], [], *heads, **finals, final_divergence="akl").loss, states[0]


@pytest.mark.parametrize(
    ("teacher", "student", "head"),
    [
        ([0.2, 0.4, 0.3, 0.1], [0.1, 0.2, 0.4, 0.3], [1]),  # the second goes beyond one half
        ([0.2, 0.15, 0.22, 0.23, 0.2], [0.1, 0.3, 0.2, 0.15, 0.25], [2, 3]),  # the third does
        ([0.04, 0.21, 0.3, 0.22, 0.23], [0.2, 0.3, 0.1, 0.3, 0.1], [2]),  # none after it is head
        ([0.1, 0.7, 0.2], [0.3, 0.5, 0.2], [1]),  # the first does: the head is never empty
        ([0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.2, 0.3], [0, 1]),  # exactly one half; ties in order
    ],
)
def test_the_entry_beyond_one_half_is_of_the_tail_unless_it_is_the_first(teacher, student, head):
    p, q = (torch.tensor(x).double() for x in (teacher, student))
    assert sorted(oracle.head(p)) == head
    gap = (p - q).abs()
    share = gap[head].sum() / gap.sum()
    expected = share * dense.kl(p, q) + (1 - share) * dense.kl(q, p)
    assert_close(given_probabilities(teacher, student)[0], expected, 1e-6)


@backends
def test_identical_models_are_exactly_zero(backend):
    problem = Distillation.make(bias=True)
    problem.teacher_hidden = [h.detach() for h in problem.student_hidden]
    problem.teacher_head = problem.student_head
    assert bool((share_of(problem, backend=backend) == 0.5).all())
    out = problem.call(final_divergence="akl", backend=backend)
    assert out.loss == 0 and out.kd == 0
    assert not any(g.any() for g in problem.gradients(out.loss).values())


def test_entries_of_no_probability_change_nothing():
    loss, student = given_probabilities([0.6, 0.4, 0.0], [0.2, 0.8, 0.0])
    expected, fewer = given_probabilities([0.6, 0.4], [0.2, 0.8])
    assert_close(loss, expected, 1e-6)
    (grad,), (expected_grad,) = (
        torch.autograd.grad(*x) for x in ((loss, student), (expected, fewer))
    )
    assert_close(grad[:, :2], expected_grad, 1e-6)
    assert grad[0, 2] == 0


def test_adaptive_kl_in_float64():
    problem = Distillation.make(**FEATURES["everything"]).double()
    out = check(problem, "akl", tolerance=1e-13, room=several_chunks(BATCH, 16))
    assert out.loss.dtype is torch.float64


@pytest.mark.parametrize("double", ["student", "teacher"])
def test_adaptive_kl_with_float64_on_one_side(double):
    problem = Distillation.make()
    wide = problem.double()
    for part in ("hidden", "head"):
        setattr(problem, f"{double}_{part}", getattr(wide, f"{double}_{part}"))
    check(problem, "akl", tolerance=2e-7)


def half(problem, narrow=("student", "teacher"), dtype=torch.bfloat16):
    rounded = problem.to(dtype)
    for side in narrow:
        for part in ("hidden", "head"):
            setattr(problem, f"{side}_{part}", getattr(rounded, f"{side}_{part}"))
    return problem


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("narrow", [("student",), ("teacher",), ("student", "teacher")])
def test_adaptive_kl_in_16_bit(backend, narrow, dtype):
    problem = half(Distillation.make(bias=True), narrow, dtype)
    twin = problem.double()
    loss, kd, _ = truth_of(twin, {"akl": 1.0})
    out = problem.call(final_divergence="akl", backend=backend)
    assert_close(out.loss, loss, 1e-5)
    assert_close(out.kd, kd, 1e-5)
    rounding = 1e-5 if "student" not in narrow else 1e-2
    assert_gradients(problem.gradients(out.loss), twin.gradients(loss), rounding)


@backends
def test_autocast_rounds_what_the_share_is_made_of(backend):
    problem = Distillation.make()
    rounded = half(copy.copy(problem)).double()
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.call(final_divergence="akl", backend=backend)
        share = share_of(problem, backend=backend)
    assert_close(out.loss, truth_of(rounded, {"akl": 1.0})[0], 1e-5)
    assert_close(share, share_of(rounded), 1e-5)


def test_autocast_leaves_the_share_of_float64_alone():
    problem = Distillation.make().double()
    with torch.autocast("cpu", torch.bfloat16):
        share = share_of(problem)
    assert torch.equal(share, share_of(problem))


def test_the_share_fills_its_workspace_and_no_more():
    shape = Shape((1024,), 4099, 16, 16, 0)
    problem = Distillation.make(shape, bias=True, softcap=4.0)
    call = {"backend": "torch", "workspace_bytes": 2**23}
    with pytest.MonkeyPatch.context() as patch:
        args = []
        patch.setattr(adaptive, "head_share", lambda *a: args.extend(a) or torch.ones(1024))
        problem.call(final_divergence="akl", **call)
    peak = peak_bytes(lambda: adaptive.head_share(*args))
    assert 2**22 < peak < 2**23 + 2**19


def test_a_name_alone_enters_once_and_each_further_one_once_more(monkeypatch):
    shares = []
    monkeypatch.setattr(adaptive, "head_share", lambda *args: shares.append(1) or torch.ones(35))
    problem = Distillation.make(norm="rms")
    finals = {
        "student_final": problem.student_hidden.pop(),
        "teacher_final": problem.teacher_hidden.pop(),
        "labels": problem.labels,
    }
    kinds = {
        "tvd": ["tvd"],
        "akl": ["forward_kl", "reverse_kl"],
        "sum": ["forward_kl", "reverse_kl", "jsd"],
    }
    values = {"sum": {"akl": 1.0, "forward_kl": 1.0, "tvd": 0.0, "jsd": 1.0}}
    for name, expected in kinds.items():
        final = values.get(name, name)
        call = capture_call(
            monkeypatch, problem, distillation_loss, final_divergence=final, **finals
        )
        assert [d.value for d in call.divergences] == ["jsd", "jsd", *expected]
        assert call.normed == (True, True) + (False,) * len(expected)
        assert call.row_weight.shape[0] == len(expected) + 3
        assert len(shares) == (name != "tvd"), "the share is made where it is needed"
        shares.clear()


@backends
def test_a_mapping_of_one_name_is_that_name(backend):
    problem = Distillation.make(norm="rms")
    options = {"labels": problem.labels, "kd_ratio": 0.5, "backend": backend}
    outs = [problem.call(final_divergence=x, **options) for x in ("jsd", {"jsd": 1.0, "tvd": 0})]
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    grads = [problem.gradients(out.loss) for out in outs]
    assert all(torch.equal(grads[0][k], grads[1][k]) for k in grads[0])


def test_the_module_follows():
    problem = Distillation.make()
    for final in (BOTH, "akl"):
        module = DistillationLoss(final_divergence=final)
        assert torch.equal(problem.call(module).loss, problem.call(final_divergence=final).loss)
        assert repr(final) in repr(module)


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


@pytest.mark.parametrize("function", [objective, DistillationLoss])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(function, case):
    value, error, words = WRONG[case]
    refused(error, ["final_divergence", *words], function, final_divergence=value)


def test_the_share_waits_for_the_last_check(monkeypatch):
    monkeypatch.setattr(adaptive, "head_share", lambda *args: 1 / 0)
    for options in ({"beta": 1.0}, {"temperature": 0}, {"workspace_bytes": 0}):
        refused(ValueError, [*options], objective, final_divergence="akl", **options)
    with pytest.raises(ValueError, match="student_final has width 5"):
        objective(student_final=torch.randn(3, 5), final_divergence=BOTH)


@pytest.mark.parametrize("final", [BOTH, "akl", SUMS["adaptive and others"]])
def test_fullgraph(final):
    problem = Distillation.make(norm="rms")
    mask = torch.rand(BATCH.leading) < 0.5

    def function(*hidden):
        out = distillation_loss(
            [h.tanh() for h in hidden[:-1]],
            problem.teacher_hidden[:-1],
            problem.student_head,
            problem.teacher_head,
            student_final=hidden[-1],
            teacher_final=problem.teacher_hidden[-1],
            labels=problem.labels,
            mask=mask,
            kd_ratio=0.5,
            final_divergence=final,
        )
        return out.loss * 2, out.kd

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, kd = function(*problem.student_hidden)
    loss, compiled_kd = compiled(*problem.student_hidden)
    assert_close(loss, expected, 1e-6)
    assert_close(compiled_kd, kd, 1e-6)
    assert_gradients(problem.gradients(loss), problem.gradients(expected), 1e-5)


def test_opcheck_of_the_share(monkeypatch):
    calls = []
    operator = adaptive._head_share
    monkeypatch.setattr(adaptive, "_head_share", lambda *a: calls.append(a) or operator(*a))
    problem = Distillation.make(**FEATURES["everything"])
    problem.call(final_divergence="akl", labels=problem.labels)
    with torch.no_grad():
        torch.library.opcheck(operator, calls[0], test_utils=("test_schema", "test_faketensor"))
