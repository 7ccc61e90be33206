"""``SparseTargets`` agree with their definition, and only the forward KL takes them."""

from dataclasses import replace

import pytest
import torch

from lens_kernels import LensHead, SparseTargets, distillation_loss, symmetric_lens_loss
from lens_kernels.backends import matmul
from reference import dense
from reference import targets as oracle
from tests.support.compare import GRADIENT, LOSS, assert_close, assert_gradients
from tests.support.grids import BACKENDS, BATCH, FEATURES, ROW_KERNEL, Shape, several_chunks
from tests.support.objectives import some_labels, some_targets
from tests.support.problems import make, random_head, recorded

RESTS = [None, "renormalize", "ghost", "uniform"]
rests = pytest.mark.parametrize("rest", RESTS)
backends = pytest.mark.parametrize("backend", BACKENDS)
KL = {"divergence": "forward_kl"}


def truth(problem, targets, mask=None, temperature=1.0, standardize=False, vocab_size=None):
    """Return the loss by its definition: the mean over pairs and counted tokens."""
    wide, values = problem.to(torch.float64), []
    for hidden in wide.student_hidden:
        z = dense.lens_logits(hidden, wide.student_head, True, vocab_size)
        z = dense.standardise(z) if standardize else z
        t = oracle.scattered(targets.token_ids, targets.probabilities, z.shape[-1])
        values.append(oracle.forward_kl(t, dense.softmax(z / temperature), targets.rest))
    rows = torch.stack(values)
    mask = torch.ones(rows.shape[1:]) if mask is None else mask
    loss = (rows * mask).sum() / mask.sum() / len(rows)
    return loss, wide.gradients(loss), rows


def sparse(problem, targets, **options):
    return symmetric_lens_loss(
        problem.student_hidden, targets, problem.student_head, None, **{**KL, **options}
    )


def check(problem, targets, backend="auto", **options):
    room = several_chunks(BATCH)
    loss = sparse(problem, targets, workspace_bytes=room, backend=backend, **options)
    expected, grads, _ = truth(problem, targets, **options)
    assert_close(loss, expected, LOSS)
    assert_gradients(problem.gradients(loss), grads, GRADIENT)


def check_beside_labels(problem, targets, labels, backend, tolerance, standardize, **options):
    """Compare a backend with ``torch`` on bounded targets and labels. Return the clipped share.

    Labels are compared at temperature 1, and are neither standardised nor bounded.
    """
    variants = {"temperature": 1.7, "standardize": standardize}
    bound = sparse(problem, targets, reduction="none", **variants).mean().item()

    def run(backend):
        out = distillation_loss(
            [], None, problem.student_head, None, student_final=problem.student_hidden[0],
            teacher_final=targets, labels=labels, kd_ratio=0.4, final_divergence="forward_kl",
            token_clip=bound, backend=backend, **variants, **options,
        )  # fmt: skip
        return out, problem.gradients(out.loss)

    (expected, grads), (out, got) = run("torch"), run(backend)
    for name in ("loss", "ce", "kd", "clipped"):
        assert_close(getattr(out, name), getattr(expected, name).double(), 1e-6, name)
    assert_gradients(got, {k: x.double() for k, x in grads.items() if x is not None}, tolerance)
    return out.clipped


def test_without_other_tokens_there_is_no_ghost_entry():
    """Rounded probabilities of the whole vocabulary may have a sum below 1."""
    problem = make(replace(BATCH, vocab=4))
    ids = torch.arange(4).expand(*BATCH.leading, 4)
    p = torch.rand(ids.shape).softmax(-1) * 0.99
    ghost, none = (sparse(problem, SparseTargets(ids, p, rest)) for rest in ("ghost", None))
    assert torch.equal(ghost, none)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ghost_entry_keeps_its_digits_beside_a_confident_student(backend):
    """The student gives about 1e-6 to all tokens that are not listed, the teacher 0.1."""
    shape = replace(BATCH, pairs=1, student=BATCH.vocab)
    problem = make(shape)
    with torch.no_grad():
        problem.student_hidden[0][..., [0, 5]] += 17.0
        problem.student_head.weight.copy_(torch.eye(shape.vocab))
    ids = torch.tensor([0, 5, 0]).expand(*shape.leading, 3)
    p = torch.tensor([0.5, 0.1, 0.3]).expand(*shape.leading, 3)
    check(problem, SparseTargets(ids, p, "ghost"), backend)


@backends
@rests
@pytest.mark.parametrize("feature", ["everything", "plain"])
def test_loss_and_gradients(backend, rest, feature):
    features = dict(FEATURES[feature])
    temperature = features.pop("temperature", 1.0)
    problem, targets = make(BATCH, std=2.0, **features), some_targets(rest=rest)
    check(problem, targets, backend, temperature=temperature)


@backends
@rests
def test_masks_prefixes_and_rows(backend, rest):
    problem, targets = make(BATCH, std=2.0, bias=True), some_targets(rest=rest, vocab=60)
    mask = torch.rand(BATCH.leading) < 0.5
    check(problem, targets, backend, mask=mask, vocab_size=60, standardize=True)
    # Masked tokens may hold any value.
    targets.token_ids[~mask] = -7
    targets.probabilities[~mask] = float("nan")
    options = {"reduction": "none", "vocab_size": 60, "backend": backend}
    rows = sparse(problem, targets, mask=mask, **options)
    assert rows.isfinite().all() and not rows[:, ~mask].any()
    targets.token_ids[~mask] = 0
    targets.probabilities[~mask] = 0.1
    *_, expected = truth(problem, targets, mask.double(), vocab_size=60)
    assert_close(rows, expected * mask, 1e-6)


@rests
def test_gradients_in_float64_by_differences(rest):
    shape = replace(BATCH, leading=(3,), pairs=1, vocab=11, student=4)
    problem = make(shape, norm="rms", bias=True).to(torch.float64)
    targets, head = some_targets(shape, 4, rest), problem.student_head
    targets = SparseTargets(targets.token_ids, targets.probabilities.double(), rest)

    def loss(hidden, weight, bias):
        lens = replace(head, weight=weight, bias=bias)
        return symmetric_lens_loss(hidden, targets, lens, None, standardize=True, **KL)

    assert torch.autograd.gradcheck(loss, (problem.student_hidden[0], head.weight, head.bias))


def test_a_label_is_the_target_of_one_token():
    problem, labels = make(replace(BATCH, pairs=1)), some_labels()
    hidden, head = problem.student_hidden, problem.student_head
    mask = labels != -100
    ids = labels.where(mask, 0)[..., None]
    targets = SparseTargets(ids, torch.ones(ids.shape))
    options = {"student_final": hidden[0], "labels": labels}
    final = {"teacher_final": targets, "final_divergence": "forward_kl", "kd_ratio": 0.5}
    out = distillation_loss([], None, head, None, **options, **final)
    assert_close(out.kd, out.ce.double(), 1e-6)
    grads = problem.gradients(out.loss)
    alone = distillation_loss([], None, head, None, **options, teacher_final=None, kd_ratio=0.0)
    expected = problem.gradients(alone.loss)
    assert_close(out.loss, alone.loss.double(), 1e-6)
    assert_gradients(grads, {k: v.double() for k, v in expected.items()}, 1e-5)


@pytest.mark.parametrize("backend", ["torch", ROW_KERNEL])
@pytest.mark.parametrize("standardize", [False, "lens"])
def test_lens_pairs_of_a_teacher_beside_sparse_targets_of_another(backend, standardize):
    """The lens pairs also have a teacher each, and the output has targets and labels."""
    shape = Shape((5,), 150, 8, 9, 3)
    problem = make(shape, std=2.0, norm="rms", bias=True, softcap=9.0)
    problem.teacher_head = [
        problem.teacher_head,
        random_head(shape.vocab, shape.teacher, norm="layer", requires_grad=False),
    ]
    targets, labels = some_targets(shape, rest=None), some_labels(shape)
    labels[0], mask = 3, torch.tensor([True, False, True, True, True])
    options = {"temperature": 1.7, "mask": mask}
    *hidden, final = problem.student_hidden
    out = distillation_loss(
        hidden, problem.teacher_hidden[:2], problem.student_head, problem.teacher_head,
        student_final=final, teacher_final=targets, labels=labels, kd_ratio=0.5, lens_coeff=3.0,
        teacher_temperature=0.8, standardize=standardize, final_divergence="forward_kl",
        backend=backend, **options,
    )  # fmt: skip
    # The same terms, each by its own definition in float64.
    wide = problem.to(torch.float64)
    lens = [
        dense.lens_loss(
            [wide.student_hidden[i]], [wide.teacher_hidden[i]], wide.student_head,
            wide.teacher_head[i], teacher_temperature=0.8, standardize=bool(standardize), **options,
        )
        for i in range(2)
    ]  # fmt: skip
    z = dense.lens_logits(wide.student_hidden[2], wide.student_head, False, None)
    t = oracle.scattered(targets.token_ids, targets.probabilities, shape.vocab)
    kd = (oracle.forward_kl(t, dense.softmax(z / 1.7), None) * mask).sum() / mask.sum()
    has_label = mask & (labels != -100)
    ce = -dense.softmax(z).log().gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    ce = ce.masked_fill(~has_label, 0.0).sum() / has_label.sum()
    expected = 0.5 * ce + 0.5 * (kd + 3.0 * sum(lens) / 2)
    for got, value in ((out.lens, sum(lens) / 2), (out.kd, kd), (out.ce, ce), (out.loss, expected)):
        assert_close(got, value.detach(), LOSS)
    assert_gradients(problem.gradients(out.loss), wide.gradients(expected), GRADIENT)


def test_three_products_and_no_tile_for_the_teacher(monkeypatch):
    problem, targets = make(replace(BATCH, pairs=1)), some_targets()
    made = [recorded(monkeypatch, matmul, name) for name in ("project", "product")]
    added = recorded(monkeypatch, matmul, "add_head_gradient")
    sparse(problem, targets).backward()
    assert [len(calls) for calls in (*made, added)] == [1, 1, 1]


def test_the_threshold_leaves_out_entries_without_gradient():
    problem, targets = make(BATCH, std=6.0), some_targets()
    exact = sparse(problem, targets)
    close = sparse(problem, targets, grad_threshold=1e-7)
    assert torch.equal(exact, close)
    expected = problem.gradients(exact)
    wide = {name: x.double() for name, x in expected.items()}
    assert_gradients(problem.gradients(close), wide, 1e-3)


@backends
def test_ghost_gradients_stay_accurate_where_the_student_has_no_rest(backend):
    logits = torch.tensor([[30.0, 0.0, -1.0, 1.0]], requires_grad=True)
    targets = SparseTargets(torch.tensor([[0]]), torch.tensor([[0.7]]), "ghost")
    options = {**KL, "backend": backend}
    loss = symmetric_lens_loss(logits, targets, LensHead(torch.eye(4)), None, **options)
    (grad,) = torch.autograd.grad(loss, logits)
    z = logits.detach().double().requires_grad_()
    t = oracle.scattered(targets.token_ids, targets.probabilities, 4)
    expected = oracle.forward_kl(t, dense.softmax(z), "ghost").mean()
    assert_close(loss, expected, 1e-5)
    assert_close(grad, torch.autograd.grad(expected, z)[0], 1e-5)


def test_samples_are_unbiased_and_a_top_k_is_not():
    """Gradients are unbiased for sampled tokens with importance weights, but not for a top-k."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 40, generator=generator).mul(1.5).softmax(-1)
    student = torch.randn(1, 40, generator=generator)
    draws, samples = 2000, 8

    def gradient(targets, rows):
        z = student.expand(rows, -1).clone().requires_grad_()
        loss = symmetric_lens_loss(z, targets, LensHead(torch.eye(40)), None, **KL)
        return torch.autograd.grad(loss, z)[0].sum(0)

    exact = (student.softmax(-1) - teacher)[0]
    proposal = teacher**0.7 / (teacher**0.7).sum()
    ids = proposal.expand(draws, -1).multinomial(samples, True, generator=generator)
    weights = (teacher / proposal)[0][ids] / samples
    error = gradient(SparseTargets(ids, weights), draws) - exact
    # The expected deviation of the mean gradient from the exact gradient, by the variance of the
    # draws.
    deviation = ((teacher[0] ** 2 / proposal[0] - teacher[0] ** 2) / (draws * samples)).sum().sqrt()
    assert error.norm() < 4 * deviation
    top, ids = teacher.topk(samples)
    for rest, least in (("renormalize", 10), ("uniform", 5)):
        bias = gradient(SparseTargets(ids, top, rest), 1) - exact
        assert bias.norm() > least * deviation, rest
    ghost = gradient(SparseTargets(ids, top, "ghost"), 1) - exact
    # the ghost entry is exact only at the listed tokens
    assert ghost[ids[0]].abs().max() < 1e-6 < ghost.norm()


def test_options_that_need_a_teacher_are_refused():
    problem, targets = make(replace(BATCH, pairs=1)), some_targets()
    hidden, head = problem.student_hidden[0], problem.student_head
    for name in ("jsd", "reverse_kl", "jeffreys", "tvd", "hellinger"):
        with pytest.raises(ValueError, match=f"divergence='{name}' cannot .* would be biased"):
            sparse(problem, targets, divergence=name)
    with pytest.raises(ValueError, match="teacher_head does not apply to SparseTargets"):
        symmetric_lens_loss(hidden, targets, head, head, **KL)
    with pytest.raises(ValueError, match="teacher_temperature does not apply"):
        sparse(problem, targets, teacher_temperature=2.0)
    final = {"student_final": hidden, "teacher_final": targets}
    with pytest.raises(ValueError, match="final_divergence='reverse_kl' cannot take"):
        distillation_loss([], None, head, None, **final)
    with pytest.raises(ValueError, match="lens pairs need the hidden states and the head of a"):
        distillation_loss([hidden], None, head, None, final_divergence="forward_kl", **final)
    with pytest.raises(ValueError, match="or for no lens pairs student_hidden=.., teacher_hidden"):
        distillation_loss([], hidden, head, None, final_divergence="forward_kl", **final)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": torch.zeros(3, 2)}, "token_ids must be int64 or int32, got torch.float32"),
        ({"token_ids": torch.zeros(4, 2).long()}, r"must both have shape \(..., K\)"),
        ({"token_ids": torch.full((3, 2), 9)}, r"token_ids must be in \[0, 5\), but 6 of 6"),
        ({"probabilities": torch.full((3, 2), -1.0)}, "must be finite and 0 or more"),
        ({"probabilities": torch.ones(3, 2), "rest": "ghost"}, r"with a sum in \(0, 1\]"),
        ({"probabilities": torch.zeros(3, 2), "rest": "renormalize"}, r"with a sum in \(0, 1\]"),
        ({"rest": "top"}, "SparseTargets.rest='top' is unknown; choose one of None"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"token_ids": torch.zeros(3, 2).long(), "probabilities": torch.full((3, 2), 0.25)}
    with pytest.raises((TypeError, ValueError), match=message):
        targets = SparseTargets(**{**given, **change})
        symmetric_lens_loss(torch.ones(3, 4), targets, torch.ones(5, 4), None, **KL)


def test_targets_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"token_ids must have shape \(3, 'K'\), got \(4, 2\)"):
        targets = SparseTargets(torch.zeros(4, 2).long(), torch.zeros(4, 2))
        symmetric_lens_loss(torch.ones(3, 4), targets, torch.ones(5, 4), None, **KL)
