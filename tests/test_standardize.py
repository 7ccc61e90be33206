"""Standardised logits, the teacher's temperature, the factor T^2, and ``token_clip``."""

import itertools

import pytest
import torch

from lens_kernels import LensHead, distillation_loss, symmetric_lens_loss
from lens_kernels.backends.torch.standardized import (
    Standardized,
    joined_moments,
    part_of_moments,
)
from tests.support.compare import GRADIENT, assert_close
from tests.support.grids import (
    BACKENDS,
    BATCH,
    CLUSTER_KERNEL,
    DIVERGENCES,
    FEATURES,
    ROW_KERNEL,
    WITH_SLOW_ROW_KERNEL,
    Shape,
    several_chunks,
)
from tests.support.objectives import some_labels
from tests.support.problems import check, make, objective, oracle, ours, solve

FEW = ["plain", "temperature", "everything"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("feature", FEW)
def test_standardised_logits(backend, divergence, feature):
    problem = make(BATCH, std=2.0, divergence=divergence, **FEATURES[feature])
    mask = torch.rand(BATCH.leading) < 0.7
    options = {"vocab_size": 60, "workspace_bytes": several_chunks(BATCH), "backend": backend}
    check(problem, standardize=True, mask=mask, **options)


def test_standardised_gradients_by_differences():
    shape = (3, 5)
    student, teacher = (torch.randn(*shape, dtype=torch.float64) for _ in range(2))
    head = LensHead(torch.randn(7, 5, dtype=torch.float64), softcap=3.0)
    options = {"standardize": True, "temperature": 1.7, "teacher_temperature": 0.6}

    def loss(hidden):
        return symmetric_lens_loss(hidden, teacher, head, head, **options)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def test_the_moments_of_parts_are_those_of_the_whole_row():
    logits = torch.randn(5, 37) + torch.tensor([0.0, 0.0, 30.0, -20.0, 1.0])[:, None]
    logits[0] = 0.3  # its mean is rounded
    logits[1] = torch.where(torch.arange(37) < 20, 0.1, 0.2)  # equal within each part
    one, parts = torch.tensor(1.0), logits.split([20, 16, 1], -1)
    moments = joined_moments(torch.stack([*map(part_of_moments, parts)]))
    z = torch.cat([Standardized.of(x, one, moments).z for x in parts], -1)
    truth = Standardized.of(logits.double(), one.double()).z
    assert not z[0].any() and z[1].all()
    assert_close(z, truth, 4e-6)  # the mean of 30 is rounded by up to 1e-6


@pytest.mark.parametrize("backend", [*BACKENDS, ROW_KERNEL])
def test_equal_logits_have_no_deviation_and_no_gradient(backend):
    """The mean of some of these logits is rounded in float32."""
    hidden = torch.tensor([[0.0], [0.1], [0.3], [-7.7]], requires_grad=True)
    for vocab in (9, 150):
        loss = symmetric_lens_loss(
            hidden, torch.randn(4, 3), torch.ones(vocab, 1), torch.randn(vocab, 3),
            standardize=True, backend=backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss, hidden)
        assert loss.isfinite() and grad.eq(0).all()


def test_lens_pairs_alone_may_be_standardised():
    problem, labels = make(BATCH, std=2.0), some_labels()
    options = {"labels": labels, "kd_ratio": 0.5, "final_divergence": "forward_kl"}
    plain = objective(problem, **options)
    lens = objective(problem, standardize="lens", **options)
    every = objective(problem, standardize=True, **options)
    assert plain.kd == lens.kd != every.kd
    assert plain.lens != lens.lens and lens.lens == every.lens
    assert torch.equal(plain.ce, every.ce)
    with pytest.raises(TypeError, match="standardize must be True, False or 'lens', got 'all'"):
        objective(problem, standardize="all", **options)
    with pytest.raises(ValueError, match="akl is not available with standardize=True"):
        objective(problem, standardize=True, final_divergence="akl")


@pytest.mark.parametrize("backend", WITH_SLOW_ROW_KERNEL)
@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
def test_the_teacher_has_its_own_temperature(backend, divergence):
    problem = make(BATCH, std=2.0, divergence=divergence, bias=True, temperature=1.6)
    check(problem, backend=backend, teacher_temperature=0.7)
    assert ours(problem, teacher_temperature=1.6)[0] == ours(problem)[0]


def test_the_factor_of_the_squared_temperature():
    problem = make(BATCH, temperature=3.0)
    expected, expected_grads = ours(problem)
    loss, grads = ours(problem, temperature_squared=True)
    assert_close(loss, 9 * expected.double(), 1e-6)
    assert_close(grads["weight"], 9 * expected_grads["weight"].double(), 1e-5)
    rows = solve(symmetric_lens_loss, problem, torch.ones(2, 5, 7), reduction="none")[0]
    options = {"reduction": "none", "temperature_squared": True}
    scaled = solve(symmetric_lens_loss, problem, torch.ones(2, 5, 7), **options)[0]
    assert_close(scaled, 9 * rows.double(), 1e-6)
    labels = {"labels": some_labels(), "kd_ratio": 0.5}
    plain, out = (objective(problem, temperature_squared=x, **labels) for x in (False, True))
    assert torch.equal(plain.ce, out.ce)
    assert_close(out.kd, 9 * plain.kd.double(), 1e-6)
    assert_close(out.loss, (out.ce + out.kd + out.lens).double() / 2, 1e-6)
    assert distillation_loss.__kwdefaults__["temperature_squared"] is False


@pytest.mark.parametrize(
    ("backend", "divergence"),
    [
        *itertools.product(BACKENDS, ["forward_kl", "jsd"]),
        (ROW_KERNEL, "jsd"),
        (CLUSTER_KERNEL, "jsd"),
    ],
)
def test_a_token_above_the_bound_counts_as_the_bound_without_gradient(backend, divergence):
    problem = make(Shape((3,), 97, 8, 9, 1), std=2.0, divergence=divergence)
    rows = ours(problem, reduction="none", upstream=torch.ones(1, 3))[0].detach()
    bound = rows.median().item() * (1 + 1e-5)
    loss, grads = ours(problem, token_clip=bound, backend=backend)
    assert_close(loss, rows.clamp(max=bound).double().mean(), 1e-6)
    below = (rows <= bound).double()
    _, expected = oracle(problem, upstream=below / rows.numel(), reduction="none")
    for name, grad in grads.items():
        assert_close(grad, expected[name], GRADIENT, name)


def test_the_share_of_tokens_above_the_bound():
    problem = make(BATCH, std=2.0, divergence="forward_kl")
    rows = ours(problem, reduction="none", upstream=torch.ones(2, 5, 7))[0].detach()
    bound = rows.median().item()
    mask = torch.rand(BATCH.leading) < 0.5
    final = {"divergence": "forward_kl", "final_divergence": "forward_kl", "mask": mask}
    out = objective(problem, token_clip=bound, **final)
    assert_close(out.clipped, (rows >= bound)[:, mask].double().mean(), 1e-6)
    assert objective(problem, **final).clipped == 0
