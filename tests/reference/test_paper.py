"""The published lens loss, which equals ours without its quirks. Each quirk changes its value."""

import itertools

import pytest
import torch

from lens_kernels import LensHead, symmetric_lens_loss
from reference import dense, paper
from reference.paper import OURS, PUBLISHED, Quirks
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import BACKENDS, Shape
from tests.support.problems import ours, related

# With four samples and three pairs, the tiled mask gives samples the masks of other samples.
SHAPE = Shape((4, 6), 61, 12, 12, 3)


@pytest.fixture
def problem():
    problem = related(SHAPE, std=2.0, norm="rms", bias=True)
    # The first sample's models differ by 0.1 and the last one's by 3, so that the choice of mask
    # matters.
    size = torch.tensor([0.1, 0.3, 1.0, 3.0])[:, None, None]
    problem.teacher_hidden = [
        (h + size * torch.randn_like(h)).detach() for h in problem.student_hidden
    ]
    return problem


@pytest.fixture
def mask():
    """Return a mask for samples whose responses differ in length."""
    return (torch.arange(6) >= torch.tensor([[0], [2], [4], [5]])).float()


def published(problem, mask, quirks=PUBLISHED):
    return paper.lens_term(*problem.args(), mask=mask, quirks=quirks)


def pair_by_pair(problem, mask, final_norm=True):
    """Return the mean loss over samples, pairs and unmasked positions, computed in plain loops."""
    total = 0.0
    for h_s, h_t in zip(problem.student_hidden, problem.teacher_hidden, strict=True):
        for b, t in itertools.product(range(4), range(6)):
            q = dense.softmax(dense.lens_logits(h_s[b, t], problem.student_head, final_norm, None))
            p = dense.softmax(dense.lens_logits(h_t[b, t], problem.teacher_head, final_norm, None))
            total += mask[b, t].item() * dense.divergence("jsd", p, q).item()
    return total / (mask.sum().item() * SHAPE.pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_quirks_it_is_our_objective(problem, mask, backend):
    expected = published(problem, mask, OURS)
    assert expected.item() == pytest.approx(pair_by_pair(problem, mask), rel=1e-12)
    loss, grads = ours(problem, mask=mask, backend=backend)
    assert_close(loss, expected, 1e-6)
    assert_gradients(grads, problem.gradients(expected), 1e-5)


def test_the_tiled_mask_masks_samples_by_each_other(problem, mask):
    right = published(problem, mask, OURS)
    tiled = published(problem, mask, Quirks(tiled_mask=True))
    assert abs(tiled / right - 1) > 0.05
    # Row r = 3 b + l is lens pair l of sample b. The tiled mask gives this row the mask of sample r
    # mod 4.
    wrong = sum((b * 3 + layer) % 4 != b for b in range(4) for layer in range(3))
    assert wrong == 8
    rows = dense.lens_loss(*problem.args(), reduction="none")
    expected = sum(
        (rows[layer, b] * mask[(b * 3 + layer) % 4]).sum() for b in range(4) for layer in range(3)
    )
    torch.testing.assert_close(tiled, expected / (3 * mask.sum()))


@pytest.mark.parametrize("same", ["one sample", "equal masks"])
def test_the_tiled_mask_is_right_where_samples_share_a_mask(problem, mask, same):
    if same == "one sample":
        problem.student_hidden = [h[1:2] for h in problem.student_hidden]
        problem.teacher_hidden = [h[1:2] for h in problem.teacher_hidden]
        mask = mask[1:2]
    else:
        mask = mask[1:2].expand(4, 6)
    tiled = published(problem, mask, Quirks(tiled_mask=True))
    assert tiled.item() == published(problem, mask, OURS).item()


@pytest.mark.parametrize(("vocab", "value"), [(50257, -5.0e-4), (151936, -1.5e-3)])
def test_epsilon_makes_the_divergence_of_identical_models_negative(vocab, value):
    logits = torch.randn(1, 2, vocab)
    p = dense.softmax(logits.double())
    assert paper.jsd(p, p, 1e-8).mean().item() == pytest.approx(value, rel=0.03)
    assert abs(paper.jsd(p, p, 0.0).mean().item()) < 1e-15

    student = logits[0, :, :1].clone().requires_grad_()
    head = LensHead(torch.randn(vocab, 1))
    loss = symmetric_lens_loss(student, student.detach(), head, head)
    loss.backward()
    assert loss.item() == 0.0 and not student.grad.any()
    args = ([student[None]], [student[None].detach()], head, head)
    negative = paper.lens_term(*args, mask=torch.ones(1, 2), quirks=Quirks(log_epsilon=1e-8))
    assert negative.item() == pytest.approx(value, rel=0.3)


def test_without_the_final_norm_lenses_are_nearly_one_hot(problem, mask):
    """Hidden states grow with depth. The norm scales them to the size that the head expects."""
    raw = published(problem, mask, Quirks(final_norm=False))
    assert raw.item() == pytest.approx(pair_by_pair(problem, mask, final_norm=False), rel=1e-12)
    assert abs(raw / published(problem, mask, OURS) - 1) > 0.01
    bare = LensHead(problem.student_head.weight, problem.student_head.bias)
    teacher = LensHead(problem.teacher_head.weight, problem.teacher_head.bias)
    hidden = problem.student_hidden, problem.teacher_hidden
    assert_close(symmetric_lens_loss(*hidden, bare, teacher, mask=mask), raw, 1e-6)

    def entropy(final_norm):
        deep = 20 * problem.student_hidden[0]
        p = dense.softmax(dense.lens_logits(deep, problem.student_head, final_norm, None))
        return -(p * p.clamp(min=1e-300).log()).sum(-1).mean()

    assert entropy(final_norm=False) < 0.6 * entropy(final_norm=True)


def test_published_has_all_three(problem, mask):
    assert PUBLISHED == Quirks(tiled_mask=True, log_epsilon=1e-8, final_norm=False)
    values = {
        quirks: published(problem, mask, quirks).item()
        for quirks in itertools.starmap(
            Quirks, itertools.product([False, True], [0.0, 1e-8], [True, False])
        )
    }
    assert len(set(values.values())) == 8
    assert values[PUBLISHED] == published(problem, mask).item()
