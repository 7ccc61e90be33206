"""The oracle agrees with torch.distributions, with torch.nn, and with values computed by hand."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F  # noqa: N812

from lens_kernels import LensHead, LensNorm
from reference import dense
from tests.support.grids import DIVERGENCES


@pytest.fixture
def pair():
    logits = 2 * torch.randn(2, 9, 41, dtype=torch.float64)
    return torch.softmax(logits[0], -1), torch.softmax(logits[1], -1)


def kl(a, b):
    return kl_divergence(Categorical(probs=a), Categorical(probs=b))


def test_kl_agrees_with_torch_distributions(pair):
    p, q = pair
    torch.testing.assert_close(dense.divergence("forward_kl", p, q), kl(p, q))
    torch.testing.assert_close(dense.divergence("reverse_kl", p, q), kl(q, p))
    torch.testing.assert_close(dense.divergence("jeffreys", p, q), kl(p, q) + kl(q, p))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_the_entropy_of_the_mixture_less_the_mean_entropy(pair, beta):
    p, q = pair
    m = Categorical(probs=beta * p + (1 - beta) * q)
    expected = m.entropy()
    expected = expected - beta * Categorical(probs=p).entropy()
    expected = expected - (1 - beta) * Categorical(probs=q).entropy()
    torch.testing.assert_close(dense.divergence("jsd", p, q, beta), expected)
    # If beta approaches 0, the ratio jsd / beta approaches a KL divergence.
    small = dense.divergence("jsd", p, q, 1e-5) / 1e-5
    torch.testing.assert_close(small, kl(p, q), rtol=1e-2, atol=0)


# The two distributions are p = (1/2, 1/2, 0) and q = (1/4, 1/4, 1/2). Their mixture is (3/8, 3/8,
# 1/4).
LN2, LN3 = math.log(2), math.log(3)
BY_HAND = {
    "jsd": 0.5 * (2 * LN2 - LN3) + 0.5 * (0.5 * (LN2 - LN3) + 0.5 * LN2),
    "forward_kl": LN2,
    "tvd": 0.5,
    "hellinger": 1 - math.sqrt(0.5),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_divergences_match_values_computed_by_hand(name):
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64)
    assert dense.divergence(name, p, q).item() == pytest.approx(BY_HAND[name], abs=1e-15)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_at_identity_and_positive_elsewhere(pair, name):
    p, q = pair
    assert dense.divergence(name, p, p).abs().max() < 1e-15
    assert bool((dense.divergence(name, p, q) > 1e-3).all())


@pytest.mark.parametrize("name", ["jsd", "jeffreys", "tvd", "hellinger"])
def test_symmetric_divergences_are_symmetric(pair, name):
    p, q = pair
    torch.testing.assert_close(dense.divergence(name, p, q), dense.divergence(name, q, p))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_agree_with_torch(kind):
    h, weight, bias = torch.randn(3, 4, 5, 8, dtype=torch.float64)[:, 0]
    weight, bias = weight[0], bias[0]
    norm = LensNorm(kind, weight - 1, bias, eps=1e-2, offset=1.0)
    if kind == "layer":
        expected = F.layer_norm(h, (8,), weight, bias, 1e-2)
    else:
        expected = F.rms_norm(h, (8,), weight, 1e-2) + bias
    torch.testing.assert_close(dense.normalise(h, norm), expected)
    bare = LensNorm(kind, None, eps=1e-2)
    expected = (F.layer_norm if kind == "layer" else F.rms_norm)(h, (8,), eps=1e-2)
    torch.testing.assert_close(dense.normalise(h, bare), expected)


def test_logits_agree_with_a_linear_layer():
    h, weight, bias = (
        torch.randn(4, 6).double(),
        torch.randn(9, 6).double(),
        torch.randn(9).double(),
    )
    z = F.linear(h, weight, bias)
    torch.testing.assert_close(dense.lens_logits(h, LensHead(weight, bias), True, None), z)
    head = LensHead(weight, bias, scale=0.5, softcap=2.0)
    capped = 2 * torch.tanh(0.5 * z / 2)
    torch.testing.assert_close(dense.lens_logits(h, head, True, None), capped)
    torch.testing.assert_close(dense.lens_logits(h, head, True, 4), capped[:, :4])


def test_the_norm_is_applied_only_if_requested():
    h, weight = torch.randn(4, 6).double(), torch.randn(9, 6).double()
    head = LensHead(weight, norm=LensNorm("rms", None, eps=0.0))
    torch.testing.assert_close(dense.lens_logits(h, head, False, None), h @ weight.T)
    unit = h / h.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(dense.lens_logits(h, head, True, None), unit @ weight.T)


def test_cross_entropy_agrees_with_torch():
    h, weight = torch.randn(2, 5, 6).double(), torch.randn(9, 6).double()
    labels = torch.randint(9, (2, 5))
    head = LensHead(weight)
    rows = dense.rows(
        [h], [h], head, head, divergences=["jsd"], normed=[False], temperature=3.0, labels=labels
    )
    expected = F.cross_entropy((h @ weight.T).flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(rows[1].flatten(), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name):
    h_s, h_t = torch.randn(2, 3, 4, dtype=torch.float64)
    w_s, w_t = torch.randn(2, 7, 4, dtype=torch.float64)

    def loss(h, w):
        return dense.lens_loss([h], [h_t], LensHead(w), LensHead(w_t), divergence=name)

    assert torch.autograd.gradcheck(loss, (h_s.requires_grad_(), w_s.requires_grad_()))


def test_reductions():
    h_s, h_t = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64)
    head = LensHead(torch.randn(7, 5, dtype=torch.float64))
    mask = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 0]])
    args = (list(h_s), list(h_t), head, head)
    rows = dense.lens_loss(*args, mask=mask, reduction="none")
    assert rows.shape == (3, 2, 4) and torch.equal(rows != 0, mask.bool().expand(3, 2, 4))
    total = dense.lens_loss(*args, mask=mask, reduction="sum", layer_weights=[1.0, 2.0, 3.0])
    per_pair = rows.sum((1, 2))
    torch.testing.assert_close(total, per_pair[0] + 2 * per_pair[1] + 3 * per_pair[2])
    mean = dense.lens_loss(*args, mask=mask)
    torch.testing.assert_close(mean, rows.sum() / (3 * mask.sum()))
    torch.testing.assert_close(dense.lens_loss(*args, mask=mask, denominator=2.0), rows.sum() / 6)
    assert dense.lens_loss(*args, mask=0 * mask) == 0
    with pytest.raises(ValueError, match="'kl'"):
        dense.lens_loss(*args, divergence="kl")


def test_the_teacher_gets_no_gradient():
    student, teacher = torch.randn(3, 4).requires_grad_(), torch.randn(3, 5).requires_grad_()
    heads = [LensHead(torch.randn(7, width).requires_grad_()) for width in (4, 5)]
    dense.lens_loss([student], [teacher], *heads).backward()
    assert student.grad.any() and heads[0].weight.grad.any()
    assert teacher.grad is None and heads[1].weight.grad is None
