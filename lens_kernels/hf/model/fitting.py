"""Measures norms, scales and soft caps, by running modules on chosen numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lens_kernels.hf.model.tracing import hooked, logits_of
from lens_kernels.lens import NORM_KINDS, LensNorm

# The largest relative difference between float32 results that count as equal.
EXACT = 1e-4
# Test rows are at least as large as the square root of this eps.
SMALLEST_EPS = 1e-12
USUAL_EPS = (1e-5, 1e-6, 1e-8, SMALLEST_EPS, 0.0)


@dataclass(frozen=True)
class NormFit:
    """The way in which a norm computes: the arguments of ``LensNorm`` that are not tensors."""

    kind: str
    eps: float
    offset: float


def difference(found: Tensor, true: Tensor) -> float:
    """Return the largest difference, relative to the largest true value."""
    true = true.double()
    off = (found.to(true.device).double() - true).abs().max() / true.abs().max().clamp(min=1e-30)
    return off.item()


def factor(a: Tensor, b: Tensor) -> float:
    """Return the number ``c`` for which ``c * b`` is closest to ``a``."""
    a, b = a.double(), b.to(a.device).double()
    return ((a * b).sum() / b.square().sum().clamp(min=1e-300)).item()


def numbers_of(config: Any) -> list[float]:
    """Return all positive numbers in a config."""
    return [float(x) for x in config.to_dict().values() if type(x) in (int, float) and x > 0]


def exact_number(measured: float, config: Any, tolerance: float = EXACT) -> float:
    """Return the exact number that was measured: 1, a number of the config, or its inverse.

    If none of them is near, return ``measured`` itself.
    """
    own = numbers_of(config)
    known = [1.0, *own, *(1 / x for x in own)]
    nearest = min(known, key=lambda x: abs(x / measured - 1) if measured else abs(x))
    return nearest if abs(nearest - measured) <= tolerance * abs(measured) else measured


def norm_rows(width: int, size: float, device: torch.device) -> Tensor:
    """Return random rows. Their mean is not 0, or RMS norms and layer norms would be equal."""
    rows = torch.randn(16, width, generator=torch.Generator().manual_seed(0)) + 0.5
    return size * rows.to(device)


def norm_sizes(eps: float) -> tuple[float, float]:
    """Return two sizes of test rows: 1 reveals a wrong weight, and sqrt(eps) a wrong eps."""
    return 1.0, max(eps, SMALLEST_EPS) ** 0.5


def in_float32(norm: nn.Module) -> nn.Module:
    """Return a copy of a norm in float32, whose results are not rounded to 16 bits."""
    return copy.deepcopy(norm).float()


def fit_norm(norm: Any, width: int, config: Any) -> NormFit:
    """Return the kind, eps and offset with which ``LensNorm`` gives the same results as ``norm``.

    Raises:
        ValueError: No known kind, eps and offset give these results.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    own = {id(x) for x in (weight, bias) if x is not None}
    if {id(x) for x in norm.parameters()} != own:
        raise ValueError(
            f"its final norm, a {type(norm).__name__}, has other parameters than weight and bias"
        )
    whole = in_float32(norm)
    device = torch.device("cpu") if weight is None else weight.device
    trials: list[tuple[float, int, NormFit]] = []
    for eps in _candidates(norm, config):
        rows = [norm_rows(width, size, device) for size in norm_sizes(eps)]
        true = [whole(x[None])[0] for x in rows]
        for kind in NORM_KINDS:
            for offset in (0.0, 1.0) if weight is not None else (0.0,):
                tried = LensNorm(kind, weight, bias, eps=eps, offset=offset)
                results = [tried.forward(x.double())[0] for x in rows]
                error = max(map(difference, results, true))
                trials.append((error, len(trials), NormFit(kind, eps, offset)))
    error, _, best = min(trials)
    if not error <= EXACT:
        raise ValueError(
            f"its final norm, a {type(norm).__name__}, is neither an RMS norm nor a layer norm with"
            f" a known eps: the nearest differs by {error:.1e} of the largest value"
        )
    return best


def _candidates(norm: Any, config: Any) -> Iterable[float]:
    own = [x for x in vars(norm).values() if type(x) is float]
    named = [x for name, x in config.to_dict().items() if "eps" in name and type(x) is float]
    finest = torch.finfo(torch.float32).eps  # nn.RMSNorm uses this number if its eps is None
    return dict.fromkeys(x for x in (*own, *named, finest, *USUAL_EPS) if 0 <= x < 0.5)


def logits_of_products(model: Any, head: Any, ids: Tensor, products: Tensor) -> Tensor:
    """Return a model's logits if its head returns ``products`` for the first tokens."""

    def put(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        put = products.new_zeros(output.shape)
        put[..., : len(products), :] = products
        return put

    # This hook runs first. Other hooks that change the head's output then change the products too.
    with hooked(x.register_forward_hook(put, prepend=True) for x in [head]):
        return logits_of(model, ids)[0, : len(products)]


@dataclass(frozen=True)
class MapFit:
    """The map from the head's products to the logits, and the number of logits."""

    scale: float
    softcap: float | None
    vocab_size: int


def fit_map(model: Any, head: Any, ids: Tensor, config: Any) -> MapFit:
    """Return how a model turns its head's products into logits: scale, soft cap and number.

    Raises:
        ValueError: The logits are not the products times a scale, with or without a soft cap.
    """
    ramp = torch.linspace(-60, 60, len(head.weight), device=head.weight.device)
    put = torch.stack([1e-3 * ramp, ramp, 1e4 * ramp.sign()])
    near, logits, far = logits_of_products(model, head, ids, put).double()
    x, sign = ramp[: len(logits)].to(logits), ramp.sign()[: len(logits)].to(logits)
    slope = factor(near, 1e-3 * x)
    scale, cap = exact_number(slope, config), None
    expected = scale * x
    if not difference(far, 1e4 * slope * sign) <= 1e-3:
        cap = exact_number(far.abs().median().item(), config)
        expected = cap * torch.tanh(expected / cap) if cap else expected
    if not (scale > 0 and difference(expected, logits) <= 1e-3):
        raise ValueError(
            "its logits are neither a multiple of the head's products nor a multiple with a soft"
            " cap"
        )
    return MapFit(scale, cap, len(logits))
