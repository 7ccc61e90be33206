"""On every backend, ``linear_cross_entropy`` agrees with plain torch in float64."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lens_kernels import linear_cross_entropy
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import BACKENDS, BATCH, FEATURES, WITH_SLOW_ROW_KERNEL, several_chunks
from tests.support.objectives import some_labels
from tests.support.problems import make

backends = pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
extras_backends = pytest.mark.parametrize("backend", BACKENDS)


def problem_of(**features):
    """Return a problem with a single hidden state, and labels for its tokens."""
    problem = make(BATCH, std=2.0, **features)
    problem.student_hidden = problem.student_hidden[:1]
    return problem, some_labels()


def dense_logits(problem, vocab_size=None):
    head = problem.student_head
    x = problem.student_hidden[0]
    if head.norm is not None:
        x = head.norm.forward(x)[0]
    return head.logits(x @ head.weight.T, 1.0)[0][..., :vocab_size]


def dense(problem, labels, **options):
    """Return the loss, computed from full logits in the problem's dtype."""
    reduction = options.get("reduction", "mean")
    z = dense_logits(problem, options.get("vocab_size"))
    mask = options.get("mask", torch.ones_like(labels)).bool()
    labels = labels.where(mask, -100)
    smoothing = options.get("label_smoothing", 0.0)
    rows = F.cross_entropy(
        z.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=smoothing
    ).view(labels.shape)
    squares = z.logsumexp(-1).square() * (labels != -100)
    rows = rows + options.get("z_loss", 0.0) * squares
    if reduction == "none":
        return rows
    counted = options.get("denominator", (labels != -100).sum().clamp(min=1))
    return rows.sum() / (counted if reduction == "mean" else 1)


def check(problem, labels, backend, **options):
    """Check that the loss and all gradients agree with float64."""
    wide = problem.to(torch.float64)
    truth = dense(wide, labels, **options)
    head = problem.student_head
    loss = linear_cross_entropy(
        problem.student_hidden[0],
        head,
        labels,
        backend=backend,
        workspace_bytes=several_chunks(BATCH),
        **options,
    )
    if isinstance(loss, tuple):
        loss, *reports = loss
        with torch.no_grad():
            check_reports(dense_logits(wide), labels, reports)
    assert loss.dtype is torch.float32 and loss.shape == truth.shape
    assert_close(loss, truth, 1e-6, "loss")
    weight = torch.rand_like(truth)
    expected = wide.gradients((truth * weight).sum())
    grads = problem.gradients((loss * weight.float()).sum())
    assert_gradients(grads, expected, 1e-5)


@backends
@pytest.mark.parametrize("feature", FEATURES)
def test_loss_and_gradients(backend, feature):
    problem, labels = problem_of(**FEATURES[feature])
    # Some problems set a temperature, which the cross entropy ignores.
    check(problem, labels, backend)


@backends
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "none"},
        {"denominator": 7.0},
        {"vocab_size": 60},
        {"mask": "random"},
        {"mask": "random", "reduction": "none"},
    ],
    ids=str,
)
def test_reductions_masks_and_prefixes(backend, options):
    problem, labels = problem_of(norm="rms", bias=True)
    labels = labels.clamp(max=options.get("vocab_size", BATCH.vocab) - 1)
    if "mask" in options:
        options = {**options, "mask": torch.rand(BATCH.leading) < 0.5}
    check(problem, labels, backend, **options)


def check_reports(logits, labels, reports):
    """Compare log-sum-exps and entropies with those of float64 logits."""
    lq = logits.log_softmax(-1)
    expected = logits.logsumexp(-1), -(lq.exp() * lq).sum(-1)
    for name, got, value in zip(("lse", "entropy"), reports, expected, strict=True):
        assert not got.requires_grad
        assert_close(got, value * (labels != -100), 1e-6, name)


EXTRAS = {
    "smoothing": {"label_smoothing": 0.1},
    "only_smoothing": {"label_smoothing": 1.0},
    "z_loss": {"z_loss": 1e-2},
    "reports": {"return_lse": True, "return_entropy": True},
}


@extras_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("extra", [*EXTRAS, "all"])
def test_smoothing_z_loss_and_reports(backend, extra, reduction):
    every = {**EXTRAS["smoothing"], **EXTRAS["z_loss"], **EXTRAS["reports"]}
    problem, labels = problem_of(norm="rms", bias=True, softcap=9.0)
    check(problem, labels, backend, reduction=reduction, **EXTRAS.get(extra, every))


def test_one_report_is_returned_alone():
    problem, labels = problem_of()
    arguments = problem.student_hidden[0], problem.student_head, labels
    both = linear_cross_entropy(*arguments, return_lse=True, return_entropy=True)
    for index, option in ((1, "return_lse"), (2, "return_entropy")):
        loss, report = linear_cross_entropy(*arguments, **{option: True})
        assert torch.equal(loss, both[0]) and torch.equal(report, both[index])


def test_ignore_index_replaces_the_label_of_no_label():
    problem, labels = problem_of()
    arguments = problem.student_hidden[0], problem.student_head
    expected = linear_cross_entropy(*arguments, labels)
    got = linear_cross_entropy(*arguments, labels.where(labels != -100, -1), ignore_index=-1)
    assert torch.equal(got, expected)


@backends
def test_tokens_without_label_are_not_read(backend):
    problem, labels = problem_of()
    with torch.no_grad():
        problem.student_hidden[0][labels == -100] = torch.nan
    loss = linear_cross_entropy(
        problem.student_hidden[0], problem.student_head, labels, backend=backend
    )
    grads = problem.gradients(loss)
    assert loss.isfinite() and all(x.isfinite().all() for x in grads.values() if x is not None)
    nothing = torch.full_like(labels, -100)
    hidden = problem.student_hidden[0]
    loss = linear_cross_entropy(hidden, problem.student_head, nothing, backend=backend)
    assert loss == 0.0
    assert not problem.gradients(loss)["hidden0"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(4)}, r"^hidden must have shape \(..., D\)"),
        (
            {"head": torch.ones(5, 9)},
            r"^hidden has width 8, but head.weight \(5, 9\) reads width 9",
        ),
        ({"labels": torch.full((3,), 5)}, r"labels must be -100 or in \[0, 5\)"),
        ({"vocab_size": 6}, r"vocab_size=6 must lie in \[1, 5\]: head has 5 entries"),
        ({"reduction": "none", "denominator": 2}, "denominator needs reduction='mean', got 'none'"),
        ({"reduction": "max"}, "reduction='max' is unknown"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be finite and lie in \[0, 1\], got 1.5"),
        ({"z_loss": -1.0}, r"z_loss must be finite and lie in \[0, inf\], got -1.0"),
        ({"labels": torch.full((3,), -100), "ignore_index": 0}, r"labels must be 0 or in \[0, 5\)"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"hidden": torch.ones(3, 8), "head": torch.ones(5, 8), "labels": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**given, **change})


def test_gradients_reach_a_compiled_function():
    problem, labels = problem_of(norm="rms")
    hidden, head = problem.student_hidden[0], problem.student_head
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    wide = problem.to(torch.float64)
    truth = dense(wide, labels)
    loss = compiled(hidden, head, labels)
    assert_close(loss, truth, 1e-6)
    assert_gradients(problem.gradients(loss), wide.gradients(truth), 1e-5)
