"""Backends that support float64 match the oracle to 13 digits, and the others raise an error."""

import pytest
import torch

from lens_kernels import LensHead, LensNorm, symmetric_lens_loss
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import (
    BACKENDS,
    BATCH,
    DIVERGENCES,
    FEATURES,
    FLOAT64_BACKENDS,
    ODD,
    TWO_TILES,
    Shape,
    several_chunks,
)
from tests.support.problems import check, loss_of, make, objective

backends = pytest.mark.parametrize("backend", FLOAT64_BACKENDS)


@backends
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64_is_computed_in_float64(backend, divergence):
    problem = make(ODD, std=2.0, **FEATURES["everything"], divergence=divergence)
    room = {"workspace_bytes": several_chunks(ODD)}
    loss, _ = check(problem.to(torch.float64), 1e-13, 1e-12, backend=backend, **room)
    assert loss.dtype is torch.float64


@backends
@pytest.mark.parametrize("double", ["student", "teacher"])
def test_float64_on_one_side_only(backend, double):
    """If one model is float64, all arithmetic is in float64. The loss has the student's dtype."""
    loss, _ = check(make(ODD).to(torch.float64, double), 1e-7, 1e-7, backend=backend)
    assert loss.dtype is (torch.float64 if double == "student" else torch.float32)


@pytest.mark.parametrize("denominator", [3, 3.0, torch.tensor(3), torch.tensor(3.0)])
def test_the_objective_keeps_its_digits_whatever_the_denominator_is(denominator):
    """Token weights stay in float64, for any dtype of the denominator."""
    problem = make(BATCH, std=2.0).to(torch.float64)
    labels = torch.randint(BATCH.vocab, BATCH.leading)
    options = {"labels": labels, "kd_ratio": 0.3, "divergence": "jsd"}
    truth = objective(problem, denominator=1.0, **options).loss / 3
    loss = objective(problem, denominator=denominator, **options).loss
    assert_close(loss, truth, 1e-14)
    assert_gradients(problem.gradients(loss), problem.gradients(truth), 1e-13)


@pytest.mark.parametrize("double", ["student", "teacher"])
@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - set(FLOAT64_BACKENDS)))
def test_float64_is_refused_with_the_reason_and_what_to_do(backend, double):
    problem = make(ODD).to(torch.float64, double)
    with pytest.raises(RuntimeError, match=f"'{backend}'.*float64.*backend='torch'"):
        loss_of(symmetric_lens_loss, problem, backend=backend)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_boundaries_inside_a_cpu_product(divergence):
    problem = make(TWO_TILES, bias=True, divergence=divergence)
    if divergence == "tvd":
        # tvd is tested in float64. Float32 rounding makes p equal q at some entries, where the
        # slope of tvd jumps.
        problem = problem.to(torch.float64)
    check(problem, backend="torch")


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(backend, divergence, reduction):
    shape = Shape((2, 2), 7, 3, 4, 2)
    features = {**FEATURES["everything"], "divergence": divergence, "beta": 0.3}
    problem = make(shape, **features).to(torch.float64)
    mask = torch.tensor([[1, 0], [1, 1]])
    weights = torch.tensor([0.7, 1.1], dtype=torch.float64, requires_grad=reduction != "none")

    def function(h0, h1, weight, bias, norm_weight, norm_bias, layer_weights):
        norm = LensNorm("layer", norm_weight, norm_bias, eps=1e-3, offset=0.5)
        head = LensHead(weight, bias, norm, scale=1.3, softcap=3.0)
        return symmetric_lens_loss(
            [h0, h1],
            problem.teacher_hidden,
            head,
            problem.teacher_head,
            mask=mask,
            layer_weights=None if reduction == "none" else layer_weights,
            reduction=reduction,
            backend=backend,
            workspace_bytes=several_chunks(shape, 4),
            **problem.options,
        )

    assert torch.autograd.gradcheck(function, (*problem.leaves().values(), weights))
