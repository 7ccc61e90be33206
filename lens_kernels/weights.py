"""Checks the weights of lens pairs and tokens, and the teacher's statistics, and sets defaults."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lens_kernels.inputs import Inputs, check_dense, check_device, check_float, check_values
from lens_kernels.options import check_number


def pair_weights(value: Any, pairs: int, inputs: Inputs) -> Tensor:
    """Return the weights of the lens pairs, ``(L,)``, each ``1 / L`` by default."""
    dtype, device = inputs.compute_dtype, inputs.device
    if value is None:
        return torch.full((pairs,), 1.0 / max(1, pairs), dtype=dtype, device=device)
    if isinstance(value, (list, tuple)):
        each = [check_number(f"layer_weights[{i}]", w, -math.inf) for i, w in enumerate(value)]
        # A tensor made from a list would be copied to the GPU, and the host would wait for that.
        like = torch.empty(0, dtype=dtype, device=device)
        value = torch.cat([like, *(like.new_full((1,), weight) for weight in each)])
    elif isinstance(value, Tensor):
        check_float("layer_weights", value)
        check_device("layer_weights", value, device)
        check_values("layer_weights", value.detach().isfinite(), "must be finite")
    else:
        kind = type(value).__name__
        raise TypeError(f"layer_weights must be a list of numbers or a 1-D tensor, got {kind}")
    if value.shape != (pairs,):
        raise ValueError(
            f"layer_weights must have shape ({pairs},), one weight for each lens pair,"
            f" got shape {tuple(value.shape)}"
        )
    return value.to(dtype)


def given_statistics(value: Any, inputs: Inputs) -> Tensor | None:
    """Check the teacher's log-sum-exps of each state and token, and return them, ``(S, N, 2)``.

    Return None if there are none.
    """
    if value is None or inputs.teacher is None:
        return None
    name = "teacher_statistics"
    check_dense(name, value)
    shape = (len(inputs.teacher.named_hidden), *inputs.leading_shape, 2)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape}: the teacher's states, the leading shape of the hidden"
            f" states, and maximum and log of sum; got {tuple(value.shape)}"
        )
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
    check_device(name, value, inputs.device)
    value = value.detach().to(inputs.compute_dtype).reshape(shape[0], -1, 2)
    valid = value.isfinite()
    if inputs.mask is not None:
        valid = valid | ~inputs.mask[:, None]
    check_values(name, valid, "must be finite")
    return value


def token_denominator(value: Any, counted: Tensor) -> Tensor | float:
    """Return the divisor of a sum over tokens, by default the number of tokens, at least 1.

    ``counted`` is 1 for each token that counts. If the divisor is a tensor, its dtype becomes that
    of ``counted``.
    """
    if value is None:
        return counted.sum().clamp(min=1)
    if not isinstance(value, Tensor):
        return check_number("denominator", value, 0.0)
    if value.numel() != 1:
        shape = tuple(value.shape)
        raise ValueError(f"denominator must be a number or a one-element tensor, got shape {shape}")
    if value.is_complex() or value.dtype is torch.bool:
        raise TypeError(f"denominator must be a real number, got {value.dtype}")
    if value.device.type != "cpu":
        check_device("denominator", value, counted.device)
    check_values("denominator", (value >= 0) & value.isfinite(), "must be finite and 0 or more")
    value = value.to(counted).reshape(())
    # A global batch without tokens has denominator 0. Its loss must be 0 and not NaN.
    return torch.where(value == 0, 1, value)
