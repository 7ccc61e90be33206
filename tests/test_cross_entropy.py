"""On every backend, ``linear_cross_entropy`` agrees with plain torch in float64."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lens_kernels import linear_cross_entropy
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import BATCH, FEATURES, WITH_SLOW_ROW_KERNEL, several_chunks
from tests.support.objectives import some_labels
from tests.support.problems import make

backends = pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)


def problem_of(**features):
    """Return a problem with a single hidden state, and labels for its tokens."""
    problem = make(BATCH, std=2.0, **features)
    problem.student_hidden = problem.student_hidden[:1]
    return problem, some_labels()


def dense(problem, labels, **options):
    """Return the loss, computed from full logits in the problem's dtype."""
    head, reduction = problem.student_head, options.get("reduction", "mean")
    x = problem.student_hidden[0]
    if head.norm is not None:
        x = head.norm.forward(x)[0]
    z = head.logits(x @ head.weight.T, 1.0)[0][..., : options.get("vocab_size")]
    mask = options.get("mask", torch.ones_like(labels)).bool()
    labels = labels.where(mask, -100)
    rows = F.cross_entropy(z.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
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
