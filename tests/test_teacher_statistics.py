"""The caller may give the teacher's log-sum-exps: they are checked, and not computed again."""

import importlib

import pytest
import torch

from lens_kernels import cost, symmetric_lens_loss
from lens_kernels.cost import CallShape
from tests.support.compare import GRADIENT, LOSS, assert_close
from tests.support.grids import BACKENDS, DIVERGENCES, FEATURES, ROW_KERNEL, Shape, several_chunks
from tests.support.objectives import make_objective, some_labels
from tests.support.problems import (
    capture_call,
    loss_of,
    make,
    objective,
    oracle,
    ours,
    recorded,
    teacher_statistics,
)
from tests.support.refusals import NAN, refused
from tests.support.refusals import small_op as op

SHAPE = Shape((3, 5), 97, 12, 20, 2)
TEMPERATURE = 1.7
# The KLs and jeffreys do not use given log-sum-exps, because they compute all sums in one sweep.
USED_BY_ALL = ["jsd", "tvd", "hellinger"]
backends = pytest.mark.parametrize("backend", [*BACKENDS, ROW_KERNEL])


@backends
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_right_statistics_give_the_same_loss_and_gradients(backend, divergence):
    problem = make(SHAPE, std=3.0, **FEATURES["everything"], divergence=divergence)
    options = {"temperature": TEMPERATURE, "mask": torch.rand(3, 5) < 0.7}
    expected, expected_grads = oracle(problem, **options)
    given = teacher_statistics(problem, TEMPERATURE)
    given[:, ~options["mask"]] = NAN  # the values of masked tokens do not matter
    options |= {"backend": backend, "workspace_bytes": several_chunks(SHAPE, 4)}
    loss, grads = ours(problem, **options, teacher_statistics=given)
    assert_close(loss, expected, LOSS)
    for name, grad in expected_grads.items():
        assert_close(grads[name], grad, GRADIENT, name)


@backends
def test_the_deferred_backward_pass_uses_them_too(backend):
    problem = make(SHAPE)
    options = {"backend": backend, "temperature": TEMPERATURE, "reduction": "none"}
    given = teacher_statistics(problem, TEMPERATURE)
    expected, right, wrong = (
        problem.gradients(loss_of(symmetric_lens_loss, problem, **options, **more).sum())
        for more in ({}, {"teacher_statistics": given}, {"teacher_statistics": given + 0.2})
    )
    for name, grad in expected.items():
        assert_close(right[name], grad, GRADIENT, name)
        assert not torch.allclose(wrong[name], grad, rtol=1e-2)


@backends
@pytest.mark.parametrize("divergence", USED_BY_ALL)
def test_wrong_statistics_change_the_result(backend, divergence):
    problem = make(SHAPE, std=2.0, divergence=divergence)
    given = teacher_statistics(problem, TEMPERATURE)
    options = {"temperature": TEMPERATURE, "backend": backend, "reduction": "none"}

    def rows(values):
        return loss_of(symmetric_lens_loss, problem, **options, teacher_statistics=values)

    right = rows(given)
    for pair, part in ((0, 0), (1, 1)):
        wrong = given.clone()
        wrong[pair, ..., part] += 0.5
        changed = rows(wrong)
        assert bool((changed[pair] != right[pair]).all())
        assert torch.equal(changed[1 - pair], right[1 - pair])


@backends
def test_the_whole_objective_takes_those_of_the_final_state_last(backend):
    problem = make_objective(SHAPE, **FEATURES["everything"])
    labels = some_labels(SHAPE)
    options = {"labels": labels, "kd_ratio": 0.5, "final_divergence": "tvd"}
    options |= {"temperature": TEMPERATURE, "backend": backend}
    given = teacher_statistics(problem, TEMPERATURE, has_final=True)
    expected = objective(problem, **options)
    got = objective(problem, **options, teacher_statistics=given)
    for name in ("loss", "ce", "kd", "lens", "per_layer"):
        assert_close(getattr(got, name), getattr(expected, name), 2 * LOSS, name)
    given[-1] += 0.1
    assert objective(problem, **options, teacher_statistics=given).kd != got.kd


@pytest.mark.parametrize(("given", "launches"), [(False, 2), (True, 1)])
def test_the_sweeps_project_the_teacher_once_less(monkeypatch, given, launches):
    problem = make(Shape((5,), 97, 12, 20, 1), divergence="jsd")
    options = {"backend": "triton", "temperature": TEMPERATURE}
    if given:
        options["teacher_statistics"] = teacher_statistics(problem, TEMPERATURE)
    call = capture_call(monkeypatch, problem, **options)
    module = importlib.import_module("lens_kernels.backends.triton.evaluate")
    calls = recorded(monkeypatch, module, "row_stats")
    ours(problem, **options)
    assert len(calls) == launches
    first, sums, *_ = cost.vocabulary_sweeps(CallShape.of(call)).steps
    assert sums.flops == 2 * 5 * 97 * (12 + 20)
    assert first.flops == 2 * 5 * 97 * (12 if given else 12 + 20)
    assert first.bytes_moved == 4 * (5 + 97) * (12 if given else 12 + 20)


VALID = torch.zeros(1, 3, 2)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ([VALID], TypeError, ["teacher_statistics", "tensor", "list"]),
        (VALID[0], ValueError, ["(1, 3, 2)", "(3, 2)"]),
        (VALID[..., :1], ValueError, ["(1, 3, 2)", "(1, 3, 1)"]),
        (VALID.half(), TypeError, ["float32 or float64", "float16"]),
        (VALID + NAN, ValueError, ["finite", "6 of 6"]),
    ],
)
def test_invalid_statistics_are_refused(value, error, words):
    refused(error, words, op, teacher_statistics=value)


def test_the_teacher_s_statistics_get_no_gradient():
    problem = make(SHAPE)
    given = teacher_statistics(problem, TEMPERATURE).requires_grad_()
    symmetric_lens_loss(*problem.args(), teacher_statistics=given).backward()
    assert given.grad is None
