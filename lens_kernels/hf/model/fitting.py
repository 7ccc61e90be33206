"""Measures how a norm, a scale and a soft cap compute, by running modules on chosen numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lens_kernels.hf.model.state import replaced_forward
from lens_kernels.hf.model.tracing import Trace, logits_of
from lens_kernels.lens import NORM_KINDS, LensNorm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The largest relative difference between float32 results that count as equal.
EXACT = 1e-4
# The smallest eps that can be measured. The smallest test rows have the size of its square root.
SMALLEST_EPS = 1e-12
USUAL_EPS = (1e-5, 1e-6, 1e-8, SMALLEST_EPS, 0.0)


@dataclass(frozen=True)
class NormFit:
    """How a norm computes: the arguments of ``LensNorm`` that are not tensors."""

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


def settings_of(model: PreTrainedModel) -> Mapping[str, object]:
    """Return the entries of a model's text config."""
    return vars(model.config.get_text_config())


def exact_number(
    measured: float, settings: Mapping[str, object], tolerance: float = EXACT
) -> float:
    """Return 1, a config's number or an inverse of one, if near ``measured``, else ``measured``."""
    own = [float(x) for x in settings.values() if isinstance(x, (int, float)) and x > 0]
    known = [1.0, *own, *(1 / x for x in own)]
    nearest = min(known, key=lambda x: abs(x / measured - 1) if measured else abs(x))
    return nearest if abs(nearest - measured) <= tolerance * abs(measured) else measured


def norm_difference(norm: nn.Module, lens_norm: LensNorm, width: int) -> float:
    """Return how much the results of a module differ from those of a ``LensNorm``.

    Both run on random rows. Half of the rows have size 1, and show a wrong weight. The others have
    size sqrt(eps), and show a wrong eps. The mean of a row is not 0, so RMS norms and layer norms
    differ. ``norm`` is in float32, because results in 16 bits would hide a wrong eps.
    """
    weight = lens_norm.weight
    rows = torch.randn(16, width, generator=torch.Generator().manual_seed(0)) + 0.5
    small = max(lens_norm.eps, SMALLEST_EPS) ** 0.5
    rows = torch.cat([rows, small * rows]).to(None if weight is None else weight.device)
    return difference(lens_norm.forward(rows.double())[0], norm(rows[None])[0])


def in_float32(norm: nn.Module) -> nn.Module:
    """Return a copy of a norm in float32, whose results are not rounded to 16 bits."""
    return copy.deepcopy(norm).float()


def fit_norm(norm: nn.Module, width: int, settings: Mapping[str, object]) -> NormFit:
    """Return the kind, eps and offset for which ``LensNorm`` gives the same results as ``norm``.

    Raises:
        ValueError: No known kind, eps and offset give these results.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    own = {id(x) for x in (weight, bias) if x is not None}
    if {id(x) for x in norm.parameters()} != own:
        raise ValueError(
            f"the final norm, a {type(norm).__name__}, has other parameters than weight and bias"
        )
    whole, errors = in_float32(norm), []
    offsets = (0.0, 1.0) if weight is not None else (0.0,)
    for eps in _candidates(norm, settings):
        for kind in NORM_KINDS:
            for offset in offsets:
                tried = LensNorm(kind, weight, bias, eps=eps, offset=offset)
                errors.append(norm_difference(whole, tried, width))
                # An eps that is wrong by a millionth is noticed, so the first match is right.
                if errors[-1] <= EXACT / 10:
                    return NormFit(kind, eps, offset)
    raise ValueError(
        f"the final norm, a {type(norm).__name__}, is neither an RMS norm nor a layer norm with"
        f" a known eps: the nearest differs by {min(errors):.1e} of the largest value"
    )


def _candidates(norm: nn.Module, settings: Mapping[str, object]) -> Iterator[float]:
    own = [x for x in vars(norm).values() if type(x) is float]
    named = [x for name, x in settings.items() if "eps" in name and type(x) is float]
    finest = torch.finfo(torch.float32).eps  # nn.RMSNorm uses this eps if its eps is None
    return (x for x in dict.fromkeys((*own, *named, finest, *USUAL_EPS)) if 0 <= x < 0.5)


def logits_of_products(
    model: PreTrainedModel, inner: PreTrainedModel, run: Trace, decoder: str, products: Tensor
) -> Tensor:
    """Return the logits that the model computes if its head returns ``products``.

    The decoder does not run again. It returns the same as in ``run``.
    """
    part = inner.get_submodule(decoder)
    called = run.last(part)
    assert called is not None  # ``run`` has recorded the call of the decoder

    def put(x: Tensor) -> Tensor:
        put = products.new_zeros(*x.shape[:-1], products.shape[-1])
        put[..., : len(products), :] = products
        return put

    # Hooks of decoder and head still run, because they may change the logits.
    with (
        replaced_forward(part, lambda *args, **options: called.output),
        replaced_forward(inner.get_output_embeddings(), put),
    ):
        return logits_of(model, run.ids)[0, : len(products)]


@dataclass(frozen=True)
class MapFit:
    """How a model turns its head's products into logits, and the number of logits."""

    scale: float
    softcap: float | None
    vocab_size: int


def fit_map(model: PreTrainedModel, inner: PreTrainedModel, run: Trace, decoder: str) -> MapFit:
    """Return how a model turns its head's products into logits: scale, cap and number of logits."""
    weight, settings = inner.get_output_embeddings().weight, settings_of(inner)
    ramp = torch.linspace(-60, 60, len(weight), device=weight.device)
    # The first products are tiny: a soft cap of 2 changes products of 0.06 by 3e-4 of their size.
    put = torch.stack([1e-5 * ramp, ramp, 1e4 * ramp.sign()])
    near, logits, far = logits_of_products(model, inner, run, decoder, put).double()
    x, sign = ramp[: len(logits)].to(logits), ramp.sign()[: len(logits)].to(logits)
    slope = factor(near, 1e-5 * x)
    scale, cap = exact_number(slope, settings), None
    expected = scale * x
    if not difference(far, 1e4 * slope * sign) <= 1e-3:
        cap = exact_number(far.abs().median().item(), settings)
        expected = cap * torch.tanh(expected / cap) if cap else expected
    if not (scale > 0 and difference(expected, logits) <= 1e-3):
        raise ValueError(
            "the logits are neither a multiple of the head's products nor a multiple with a soft"
            " cap"
        )
    return MapFit(scale, cap, len(logits))
