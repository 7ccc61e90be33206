"""The row kernels for a vocabulary that is spread over ranks, on one rank: some of their results.

The slow tests of ``test_row_pass.py`` run these kernels on all cases, and
``tests/test_process_group.py`` runs them on several ranks.
"""

import pytest
import torch

from lens_kernels.backends.triton import interpreter
from tests.backends.triton import test_row_pass
from tests.backends.triton.test_row_pass import over_one_rank, run, truth
from tests.support.compare import GRADIENT, LOSS, assert_close


@pytest.fixture(autouse=True)
def split():
    interpreter.prepare()
    with over_one_rank():
        yield


@pytest.mark.parametrize("divergence", ["jsd", "jeffreys"])
def test_losses_and_gradients(divergence):
    zs, zt = 3 * torch.randn(2, 211), 3 * torch.randn(2, 211)
    options = {"labels": torch.tensor([210, 70]), "temperature": 1.7}
    losses, grad, _ = run(zs, zt, divergence, **options)
    expected, expected_grad = truth(zs, zt, divergence, **options)
    for got, wanted in zip(losses, expected, strict=True):
        assert_close(got, wanted, LOSS)
    assert_close(grad, expected_grad, GRADIENT)


def test_the_statistics_describe_the_written_gradient():
    test_row_pass.test_the_statistics_describe_the_written_gradient()


def test_unusual_rows():
    """A row whose logits are all -inf has a uniform softmax, and a NaN affects only its row."""
    test_row_pass.test_rows_without_a_finite_logit_are_uniform("jsd", 0.5, 300.0)
    test_row_pass.test_a_row_that_is_not_a_number_stays_alone("tvd", 0.5, 1, float("nan"))


def test_the_plan_counts_the_bytes_that_the_kernels_move(monkeypatch):
    counted = test_row_pass.test_the_plan_counts_the_bytes_that_the_kernel_moves
    counted(monkeypatch, "split", "forward_kl", 0.5, True, True)
