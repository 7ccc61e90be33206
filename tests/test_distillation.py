"""``distillation_loss`` against its terms computed apart: loss, metrics, one head gradient."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lens_kernels import DistillationLoss, SymmetricLensLoss, distillation_loss
from lens_kernels import symmetric_lens_loss as lens_loss
from lens_kernels.backends.torch import row_chunks
from reference import dense
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import BACKENDS, BATCH, DIVERGENCES, FEATURES, Shape, several_chunks
from tests.support.problems import Problem, capture_call, make, objective

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


class Distillation(Problem):
    """A problem with a last pair of hidden states, the final one, and labels."""

    @classmethod
    def make(cls, shape=BATCH, std=2.0, **features):
        more = Shape(shape.leading, shape.vocab, shape.student, shape.teacher, shape.pairs + 1)
        base = make(more, std, **features)
        problem = cls(**vars(base))
        problem.labels = torch.randint(shape.vocab, shape.leading)
        problem.labels[torch.rand(shape.leading) < 0.3] = -100
        return problem

    def double(self):
        problem = Distillation(**vars(Problem.to(self, torch.float64)))
        problem.labels = self.labels
        return problem

    def call(self, function=distillation_loss, **options):
        return objective(self, function, **options)


def expected_terms(
    problem,
    *,
    labels=None,
    mask=None,
    kd_ratio=1.0,
    lens_coeff=1.0,
    final_divergence="reverse_kl",
    divergence="jsd",
    beta=0.5,
    temperature=1.0,
    layer_weights=None,
    denominator=None,
    vocab_size=None,
):
    """The terms one by one, in float64, cross entropy by torch."""
    s, t, s_head, t_head = problem.args()
    if mask is None:
        mask = torch.ones(s[0].shape[:-1]) if labels is None else labels != -100
    kept = mask.double()
    tokens = max(1.0, kept.sum().item()) if denominator is None else float(denominator)
    weights = layer_weights or [1 / max(1, len(s) - 1)] * (len(s) - 1)

    def divergence_of(i, name, normed):
        z_s = dense.lens_logits(s[i], s_head, normed, vocab_size)
        z_t = dense.lens_logits(t[i], t_head, normed, vocab_size)
        p = dense.softmax(z_t.detach() / temperature)
        value = dense.divergence(name, p, dense.softmax(z_s / temperature), beta)
        return (value * kept).sum() / tokens

    last = len(s) - 1
    kd = divergence_of(last, final_divergence, normed=False)
    per_layer = [divergence_of(i, divergence, normed=True) for i in range(last)]
    lens = sum((w * x for w, x in zip(weights, per_layer, strict=True)), torch.zeros(()).double())
    loss = kd_ratio * (kd + lens_coeff * lens)
    ce = None
    if labels is not None:
        counted = torch.where(mask.bool(), labels, -100).flatten()
        logits = dense.lens_logits(s[last], s_head, False, vocab_size).flatten(0, -2)
        ce = F.cross_entropy(logits, counted, ignore_index=-100, reduction="sum")
        count = max(1, int((counted != -100).sum())) if denominator is None else denominator
        ce = ce / count
        loss = loss + (1 - kd_ratio) * ce
    return {"loss": loss, "ce": ce, "kd": kd, "lens": lens, "per_layer": per_layer, "n": kept.sum()}


def check(problem, zero=(), backend="torch", workspace_bytes=None, **options):
    truth_problem = problem.double()
    truth = expected_terms(truth_problem, **problem.options, **options)
    out = problem.call(backend=backend, workspace_bytes=workspace_bytes, **options)
    assert_close(out.loss, truth["loss"], 1e-6, "loss")
    if truth["ce"] is None:
        assert out.ce is None
    else:
        assert_close(out.ce, truth["ce"], 1e-6, "ce")
    assert_close(out.kd, truth["kd"], 1e-6, "kd")
    if truth["per_layer"]:
        assert_close(out.lens, truth["lens"], 1e-6, "lens")
        assert_close(out.per_layer, torch.stack(truth["per_layer"]), 1e-6, "per_layer")
    else:
        assert out.lens is None and out.per_layer.shape == (0,)
    assert out.num_tokens == truth["n"]
    for name in ("ce", "kd", "lens", "per_layer", "num_tokens"):
        assert getattr(out, name) is None or not getattr(out, name).requires_grad
    grads = problem.gradients(out.loss)
    expected = truth_problem.gradients(truth["loss"])
    expected = {k: torch.zeros(1) if g is None else g for k, g in expected.items()}
    assert_gradients(grads, expected, 1e-5, zero)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kd_ratio", [0.3, 1.0])
def test_terms_and_gradients(backend, feature, kd_ratio):
    """Temperature tempers the divergences and never the cross entropy."""
    problem = Distillation.make(**FEATURES[feature])
    check(
        problem,
        labels=problem.labels,
        kd_ratio=kd_ratio,
        backend=backend,
        workspace_bytes=several_chunks(BATCH),
    )


@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_cross_entropy_alone_does_no_teacher_work(backend, feature):
    """``kd_ratio=0`` neither needs a teacher nor reads one, and no lens of the student."""
    problem = Distillation.make(**FEATURES[feature])
    truth_problem = problem.double()
    truth = expected_terms(truth_problem, labels=problem.labels, kd_ratio=0.0, **problem.options)
    student, head, final = problem.student_hidden[:-1], problem.student_head, {}
    final["student_final"] = problem.student_hidden[-1]
    options = {"labels": problem.labels, "kd_ratio": 0.0, "backend": backend, **problem.options}
    out = distillation_loss(student, None, head, None, **final, teacher_final=None, **options)
    assert_close(out.loss, truth["ce"], 1e-6, "loss")
    assert_close(out.ce, truth["ce"], 1e-6, "ce")
    assert out.num_tokens == truth["n"]
    assert out.kd is None and out.lens is None and out.per_layer.shape == (0,)
    expected = truth_problem.gradients(truth["ce"])
    grads = problem.gradients(out.loss)
    reached = [name for name, grad in expected.items() if grad is not None]
    assert {"hidden2", "weight"} <= set(reached) and not {"hidden0", "norm_weight"} & set(reached)
    assert_gradients({k: grads[k] for k in reached}, {k: expected[k] for k in reached}, 1e-5)
    assert not any(g.any() for k, g in grads.items() if g is not None and k not in reached)
    garbage = [torch.full_like(h, float("nan")) for h in problem.teacher_hidden]
    with_teacher = distillation_loss(
        student,
        garbage[:-1],
        head,
        problem.teacher_head,
        **final,
        teacher_final=garbage[-1],
        **options,
    )
    assert torch.equal(with_teacher.loss, out.loss) and with_teacher.kd is None


@pytest.mark.parametrize("final_divergence", DIVERGENCES)
@pytest.mark.parametrize("divergence", ["jsd", "hellinger"])
def test_final_and_lens_divergence(backend, final_divergence, divergence):
    problem = Distillation.make(norm="rms")
    check(
        problem,
        final_divergence=final_divergence,
        divergence=divergence,
        beta=0.2,
        temperature=1.5,
        labels=problem.labels,
        kd_ratio=0.5,
        backend=backend,
    )


@pytest.mark.parametrize("lens_coeff", [0.0, 0.5, 4.0])
def test_lens_coeff(backend, lens_coeff):
    zero = ("hidden0", "hidden1", "norm_weight") if lens_coeff == 0.0 else ()
    check(Distillation.make(norm="rms"), zero, lens_coeff=lens_coeff, backend=backend)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("denominator", [None, 17.0])
def test_labels_mask_and_denominator(backend, labelled, masked, denominator):
    """A mask overrides the labels in what counts, and cross entropy counts where both do."""
    problem = Distillation.make(norm="layer", bias=True)
    check(
        problem,
        labels=problem.labels if labelled else None,
        mask=(torch.rand(BATCH.leading) < 0.6).int() if masked else None,
        kd_ratio=0.4 if labelled else 1.0,
        denominator=denominator,
        layer_weights=[0.3, 1.2],
        backend=backend,
        workspace_bytes=several_chunks(BATCH, 4),
    )


def test_int32_labels(backend):
    problem = Distillation.make()
    options = {"kd_ratio": 0.5, "backend": backend}
    loss = problem.call(labels=problem.labels, **options).loss
    assert torch.equal(problem.call(labels=problem.labels.int(), **options).loss, loss)


def test_vocabulary_prefix_bounds_the_cross_entropy_too(backend):
    problem = Distillation.make(bias=True)
    labels = problem.labels.clamp(max=59)
    check(problem, labels=labels, kd_ratio=0.5, vocab_size=60, backend=backend)


def test_without_lens_pairs(backend):
    problem = Distillation.make(Shape((5, 7), 97, 33, 17, 0), norm="rms")
    assert len(problem.student_hidden) == 1
    check(problem, ("norm_weight",), labels=problem.labels, kd_ratio=0.5, backend=backend)


def test_nothing_counted_is_zero_with_zero_gradients(backend):
    problem = Distillation.make(norm="rms")
    for options in (
        {"labels": torch.full(BATCH.leading, -100)},
        {"labels": problem.labels, "mask": torch.zeros(BATCH.leading)},
    ):
        out = problem.call(kd_ratio=0.5, backend=backend, **options)
        for value in (out.loss, out.ce, out.kd, out.lens, out.per_layer, out.num_tokens):
            assert not value.any()
        assert not any(g.any() for g in problem.gradients(out.loss).values())


def test_masked_positions_are_inert_whatever_they_hold(backend):
    problem = Distillation.make(norm="rms")
    options = {"labels": problem.labels, "kd_ratio": 0.5, "backend": backend}
    clean = problem.call(**options)
    grads = problem.gradients(clean.loss)
    dropped = problem.labels == -100
    with torch.no_grad():
        for h in problem.student_hidden + problem.teacher_hidden:
            h[dropped] = float("nan")
    dirty = problem.call(**options)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    for name, grad in problem.gradients(dirty.loss).items():
        assert torch.equal(grad, grads[name])


def test_it_is_its_separate_calls(backend):
    """Three calls of the public functions add up to one, with one head gradient for the sum."""
    problem = Distillation.make(norm="rms", bias=True)
    mask = torch.rand(BATCH.leading) < 0.5
    s, t, s_head, t_head = problem.args()
    shared = {"mask": mask, "backend": backend, "temperature": 2.0}
    lens = lens_loss(s[:-1], t[:-1], s_head, t_head, **shared)
    bare = [type(h)(h.weight, h.bias) for h in (s_head, t_head)]
    final = lens_loss(s[-1], t[-1], *bare, divergence="reverse_kl", **shared)
    ce_only = {"labels": problem.labels, "kd_ratio": 0.0, "mask": mask, "backend": backend}
    ce = problem.call(**ce_only).loss
    total = 0.25 * ce + 0.75 * (final + 0.5 * lens)
    out = problem.call(labels=problem.labels, kd_ratio=0.75, lens_coeff=0.5, **shared)
    assert_close(out.loss, total, 1e-6)
    assert_gradients(problem.gradients(out.loss), problem.gradients(total), 1e-5)


def test_micro_batches_accumulate(backend):
    problem = Distillation.make(norm="rms")
    options = {"labels": problem.labels, "kd_ratio": 0.5, "backend": backend}
    whole = problem.call(**options)
    count = int((problem.labels != -100).sum())
    total = torch.zeros(())
    for part in (slice(0, 1), slice(1, 4), slice(4, 5)):
        micro = Distillation(
            [h[part] for h in problem.student_hidden],
            [h[part] for h in problem.teacher_hidden],
            problem.student_head,
            problem.teacher_head,
            problem.options,
        )
        out = micro.call(**{**options, "labels": problem.labels[part]}, denominator=count)
        total = total + out.loss
    assert_close(total, whole.loss, 1e-6)
    assert_gradients(problem.gradients(total), problem.gradients(whole.loss), 1e-5)


def test_16_bit(backend):
    problem = Distillation.make(norm="rms", bias=True)
    half = Distillation(**vars(problem.to(torch.bfloat16)))
    half.labels = problem.labels
    truth_problem = half.double()
    truth = expected_terms(truth_problem, labels=problem.labels, kd_ratio=0.5)
    out = half.call(labels=problem.labels, kd_ratio=0.5, backend=backend)
    assert out.loss.dtype is torch.float32
    assert_close(out.loss, truth["loss"], 1e-5)
    assert_gradients(half.gradients(out.loss), truth_problem.gradients(truth["loss"]), 1e-2)


def test_the_head_gradient_exists_once(backend, monkeypatch):
    """Four pairs and the cross entropy share one accumulator of the head's size."""
    problem = Distillation.make(Shape((3, 5), 97, 33, 17, 3))
    finals = {
        "student_final": problem.student_hidden.pop(),
        "teacher_final": problem.teacher_hidden.pop(),
    }
    call = capture_call(
        monkeypatch, problem, distillation_loss, labels=problem.labels, kd_ratio=0.5, **finals
    )
    assert len(call.student_hidden) == 4 and call.row_weight.shape == (5, 15)
    with torch.no_grad():
        result = row_chunks.evaluate(call)
    assert [k for k in result.grads if isinstance(k, str)] == ["weight"]


def test_modules_equal_their_functions(backend):
    problem = Distillation.make(norm="rms")
    options = {
        "kd_ratio": 0.6,
        "lens_coeff": 0.5,
        "temperature": 2.0,
        "final_divergence": "forward_kl",
        "backend": backend,
    }
    per_call = {"labels": problem.labels, "mask": torch.rand(BATCH.leading) < 0.7}
    module = DistillationLoss(**options)
    out = problem.call(module, **per_call)
    expected = problem.call(**per_call, **options)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert "kd_ratio=0.6" in repr(module) and not list(module.parameters())

    options = {"divergence": "tvd", "reduction": "sum", "backend": backend}
    args = problem.args()
    for more in ({}, {"mask": per_call["mask"]}):
        assert torch.equal(
            SymmetricLensLoss(**options)(*args, **more), lens_loss(*args, **more, **options)
        )
    mean = SymmetricLensLoss(backend=backend)
    expected = lens_loss(*args, denominator=3.0, backend=backend)
    assert torch.equal(mean(*args, denominator=3.0), expected)
    assert "divergence='jsd'" in repr(mean)
