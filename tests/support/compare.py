"""Compares a tensor with its true value, relative to the largest true entry.

An absolute tolerance that is larger than all gradients would accept zeros. Here zeros have an error
of 1, and NaN always fails. The true value of a gradient must also differ from zeros and from its
own entries in another order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# The default tolerances between float32 results and the float64 oracle.
LOSS, GRADIENT = 1e-6, 1e-5


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Return the largest deviation, divided by the largest true entry."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    actual, truth = actual.detach().double(), truth.detach().double()
    assert bool(torch.isfinite(truth).all()), "the truth is not finite"
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    deviation, scale = (actual - truth).abs().max().item(), truth.abs().max().item()
    if scale == 0.0:
        return 0.0 if deviation == 0.0 else float("inf")
    return deviation / scale


def assert_close(actual: Tensor | None, truth: Tensor, tolerance: float, name: str = "") -> None:
    assert actual is not None, f"{name}: nothing to compare"
    assert 0.0 <= tolerance < 0.1, "the tolerance is so large that zeros could pass"
    error = relative_error(actual, truth)
    assert error <= tolerance, f"{name}: relative error {error:.2e} exceeds {tolerance:.0e}"


def assert_informative(truth: Tensor, tolerance: float, name: str = "") -> None:
    """Fail if the true value is zero, or if another order of its entries would be accepted."""
    assert bool((truth != 0).any()), f"{name}: the truth is zero everywhere"
    for dim, size in enumerate(truth.shape):
        if size > 1:
            error = relative_error(truth.roll(1, dim), truth)
            assert error > 10 * tolerance, (
                f"{name}: axis {dim} of the truth is insensitive to order"
            )


def assert_gradients(
    actual: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    tolerance: float,
    zero: tuple[str, ...] = (),
) -> None:
    """Compare gradients by name.

    Gradients named in ``zero`` must be 0. The true values of all others must pass
    ``assert_informative``.
    """
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        assert expected is not None, f"{name}: the truth has no gradient"
        if name in zero:
            assert actual[name] is not None and not bool(actual[name].any()), f"{name} is not 0"
            continue
        assert_informative(expected, tolerance, name)
        assert_close(actual[name], expected, tolerance, name)
