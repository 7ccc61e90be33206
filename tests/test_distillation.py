"""``distillation_loss`` equals the sum of separately computed terms, and has one head gradient."""

import pytest
import torch

from lens_kernels import DistillationLoss, SymmetricLensLoss, distillation_loss
from lens_kernels import symmetric_lens_loss as lens_loss
from lens_kernels.backends.torch import row_chunks
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import (
    BATCH,
    DIVERGENCES,
    FEATURES,
    WITH_SLOW_ROW_KERNEL,
    Shape,
    several_chunks,
)
from tests.support.objectives import (
    check_objective,
    make_objective,
    solve_objective,
    some_labels,
    terms_of,
)
from tests.support.problems import Problem, capture_call, objective

backends = pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
NO_LENS = Shape((5, 7), 97, 33, 17, 0)


@backends
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kd_ratio", [0.3, 1.0])
def test_terms_and_gradients(backend, feature, kd_ratio):
    """The temperature applies to the divergences, but not to the cross entropy."""
    problem = make_objective(**FEATURES[feature])
    options = {"labels": some_labels(), "kd_ratio": kd_ratio}
    check_objective(problem, backend=backend, room=several_chunks(BATCH), **options)


@backends
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_cross_entropy_alone_does_no_teacher_work(backend, feature):
    """With ``kd_ratio=0``, the loss reads neither the teacher nor the student's lens states."""
    problem, labels = make_objective(**FEATURES[feature]), some_labels()
    wide = problem.to(torch.float64)
    truth = terms_of(wide, labels=labels, kd_ratio=0.0, **problem.options)
    *student, final = problem.student_hidden
    options = {"labels": labels, "kd_ratio": 0.0, "backend": backend, **problem.options}
    finals = {"student_final": final, "teacher_final": None}
    out = distillation_loss(student, None, problem.student_head, None, **finals, **options)
    assert_close(out.loss, truth.ce, 1e-6, "loss")
    assert_close(out.ce, truth.ce, 1e-6, "ce")
    assert out.num_tokens == truth.n
    assert out.kd is None and out.lens is None and out.per_layer.shape == (0,)
    expected, grads = wide.gradients(truth.ce), problem.gradients(out.loss)
    reached = [name for name, grad in expected.items() if grad is not None]
    assert {"hidden2", "weight"} <= set(reached) and not {"hidden0", "norm_weight"} & set(reached)
    assert_gradients({k: grads[k] for k in reached}, {k: expected[k] for k in reached}, 1e-5)
    assert not any(g.any() for k, g in grads.items() if g is not None and k not in reached)
    problem.teacher_hidden = [torch.full_like(h, float("nan")) for h in problem.teacher_hidden]
    with_teacher = objective(problem, **options)
    assert torch.equal(with_teacher.loss, out.loss) and with_teacher.kd is None


@backends
@pytest.mark.parametrize("final_divergence", DIVERGENCES)
@pytest.mark.parametrize("divergence", ["jsd", "hellinger"])
def test_final_and_lens_divergence(backend, final_divergence, divergence):
    options = {"final_divergence": final_divergence, "divergence": divergence}
    options |= {"beta": 0.2, "temperature": 1.5, "labels": some_labels(), "kd_ratio": 0.5}
    check_objective(make_objective(norm="rms"), backend=backend, **options)


@backends
@pytest.mark.parametrize("lens_coeff", [0.0, 0.5, 4.0])
def test_lens_coeff(backend, lens_coeff):
    zero = ("hidden0", "hidden1", "norm_weight") if lens_coeff == 0.0 else ()
    problem = make_objective(norm="rms")
    check_objective(problem, zero=zero, lens_coeff=lens_coeff, backend=backend)


@backends
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("denominator", [None, 17.0])
def test_labels_mask_and_denominator(backend, labelled, masked, denominator):
    """Without a mask, all positions with a label count.

    With a mask, cross entropy counts positions that have a label and a mask of 1.
    """
    check_objective(
        make_objective(norm="layer", bias=True),
        labels=some_labels() if labelled else None,
        mask=(torch.rand(BATCH.leading) < 0.6).int() if masked else None,
        kd_ratio=0.4 if labelled else 1.0,
        denominator=denominator,
        layer_weights=[0.3, 1.2],
        backend=backend,
        room=several_chunks(BATCH, 4),
    )


@backends
def test_int32_labels_and_a_vocabulary_prefix(backend):
    labels = some_labels().clamp(max=59).int()
    problem = make_objective(bias=True)
    check_objective(problem, labels=labels, kd_ratio=0.5, vocab_size=60, backend=backend)


@backends
def test_without_lens_pairs(backend):
    problem = make_objective(NO_LENS, norm="rms")
    options = {"labels": some_labels(), "kd_ratio": 0.5}
    check_objective(problem, zero=("norm_weight",), backend=backend, **options)


@backends
@pytest.mark.parametrize("by", ["labels", "mask"])
def test_no_counted_token_gives_zero_loss_and_gradients(backend, by):
    options = {"labels": torch.full(BATCH.leading, -100)}
    if by == "mask":
        options = {"labels": some_labels(), "mask": torch.zeros(BATCH.leading)}
    problem = make_objective(norm="rms")
    out, grads = solve_objective(problem, kd_ratio=0.5, backend=backend, **options)
    for value in (out.loss, out.ce, out.kd, out.lens, out.per_layer, out.num_tokens):
        assert not value.any()
    assert not any(g.any() for g in grads.values())


@backends
@pytest.mark.parametrize("final_divergence", ["reverse_kl", "akl"])
def test_masked_positions_have_no_effect(backend, final_divergence):
    problem, labels = make_objective(norm="rms"), some_labels()
    options = {"labels": labels, "kd_ratio": 0.5, "final_divergence": final_divergence}
    clean, grads = solve_objective(problem, backend=backend, **options)
    dirty, dirty_grads = solve_objective(problem.spoil(labels == -100), backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert all(torch.equal(grad, dirty_grads[name]) for name, grad in grads.items())


@backends
def test_micro_batches_accumulate(backend):
    problem, labels = make_objective(norm="rms"), some_labels()
    options = {"kd_ratio": 0.5, "backend": backend}
    whole, grads = solve_objective(problem, labels=labels, **options)
    options["denominator"] = int((labels != -100).sum())
    total = torch.zeros(())
    for part in (slice(0, 1), slice(1, 4), slice(4, 5)):
        hidden = ([h[part] for h in side] for side in problem.args()[:2])
        micro = Problem(*hidden, *problem.args()[2:], problem.options)
        total = total + objective(micro, labels=labels[part], **options).loss
    assert_close(total, whole.loss, 1e-6)
    assert_gradients(problem.gradients(total), grads, 1e-5)


@backends
def test_16_bit(backend):
    # The problem has no norm, because the result of a norm would be rounded to 16 bits.
    problem = make_objective(bias=True).to(torch.bfloat16)
    options = {"labels": some_labels(), "kd_ratio": 0.5, "backend": backend}
    out = check_objective(problem, 1e-5, 1e-2, **options)
    assert out.loss.dtype is torch.float32


def test_the_head_gradient_exists_once(monkeypatch):
    """Three lens pairs, the final pair and the cross entropy add to a single head gradient."""
    problem = make_objective(Shape((5, 7), 97, 33, 17, 3))
    options = {"labels": some_labels(), "kd_ratio": 0.5}
    call = capture_call(monkeypatch, problem, whole=True, **options)
    assert len(call.student_hidden) == 4 and call.row_weight.shape == (5, 35)
    with torch.no_grad():
        result = row_chunks.evaluate(call)
    assert [k for k in result.grads if isinstance(k, str)] == ["weight"]


@pytest.mark.parametrize("final_divergence", ["forward_kl", "akl", {"jsd": 0.5, "tvd": 2.0}])
def test_the_module_of_the_objective_is_its_function(final_divergence):
    problem = make_objective(norm="rms")
    options = {"kd_ratio": 0.6, "lens_coeff": 0.5, "temperature": 2.0}
    options["final_divergence"] = final_divergence
    module = DistillationLoss(**options)
    per_call = {"labels": some_labels(), "mask": torch.rand(BATCH.leading) < 0.7}
    out = objective(problem, module, **per_call)
    expected = objective(problem, **per_call, **options)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert "kd_ratio=0.6" in repr(module) and not list(module.parameters())
    assert repr(final_divergence) in repr(module)


@pytest.mark.parametrize("options", [{"divergence": "tvd", "reduction": "sum"}, {"beta": 0.3}])
def test_the_module_of_the_lenses_is_its_function(options):
    args = make_objective(norm="rms").args()
    per_call = {"mask": torch.rand(BATCH.leading) < 0.7}
    if "reduction" not in options:
        per_call["denominator"] = 3.0
    module = SymmetricLensLoss(**options)
    assert torch.equal(module(*args, **per_call), lens_loss(*args, **per_call, **options))
    assert repr(options.get("divergence", "jsd")) in repr(module)
