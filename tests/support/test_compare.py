"""The comparison accepts rounding errors and rejects wrong values."""

import pytest
import torch

from tests.support.compare import assert_close, assert_gradients, assert_informative, relative_error


@pytest.fixture
def truth():
    return 1e-6 * torch.randn(7, 5, dtype=torch.float64)


def test_accepts_rounding(truth):
    assert_close((truth * (1 + 1e-7)).float(), truth, 1e-6)
    assert relative_error(truth + 0.5 * truth.abs().max(), truth) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "spoil",
    [
        torch.zeros_like,
        lambda x: x.roll(1, 0),
        lambda x: x.roll(1, 1),
        lambda x: x.flatten()[torch.randperm(x.numel())].reshape(x.shape),
        lambda x: -x,
        lambda x: x * 1.2,
        lambda x: torch.where(x == x.max(), float("nan"), x),
        lambda x: torch.where(x == x.min(), float("inf"), x),
    ],
    ids=["zeros", "rows", "columns", "shuffled", "negated", "scaled", "nan", "inf"],
)
def test_rejects(truth, spoil):
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(spoil(truth), truth, 0.09)


def test_rejects_what_cannot_be_compared(truth):
    for actual, tolerance, reason in ((truth[:1], 1e-2, "shape"), (None, 1e-2, "nothing")):
        with pytest.raises(AssertionError, match=reason):
            assert_close(actual, truth, tolerance)
    with pytest.raises(AssertionError, match="zeros could pass"):
        assert_close(truth, truth, 1.0)


def test_a_truth_of_zero_is_matched_by_zero_alone():
    zero = torch.zeros(3)
    assert_close(zero, zero, 1e-6)
    with pytest.raises(AssertionError):
        assert_close(zero + 1e-30, zero, 1e-6)


def test_rejects_an_uninformative_truth(truth):
    for poor in (torch.zeros(4, 3), torch.ones(4, 3), truth[:1].expand(7, 5)):
        with pytest.raises(AssertionError, match="zero everywhere|insensitive"):
            assert_informative(poor, 1e-5)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(truth, truth / 0, 1e-2)


def test_gradients_are_matched_by_name(truth):
    expected = {"a": truth, "b": truth}
    assert_gradients({"a": truth, "b": 0 * truth}, expected, 1e-9, zero=("b",))
    for grads, zero, reason in (
        ({"a": truth, "b": 0 * truth}, (), "b: relative error"),
        ({"a": truth}, (), None),
        (expected, ("b",), "b is not 0"),
    ):
        with pytest.raises(AssertionError, match=reason):
            assert_gradients(grads, expected, 1e-9, zero=zero)
