"""Measures how a norm, a scale and a soft cap compute, by running modules on chosen numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lens_kernels.hf.model.parts import NormFit, plain_norm
from lens_kernels.hf.model.state import replaced_forward
from lens_kernels.hf.model.tracing import Trace, logits_of, settings_of
from lens_kernels.lens import NORM_KINDS, LensNorm

# The largest relative difference between float32 results that count as equal.
EXACT = 1e-4
# The smallest eps that can be measured. The smallest test rows have the size of its square root.
SMALLEST_EPS = 1e-12
# The first one is used by nn.RMSNorm if its eps is None.
USUAL_EPS = (torch.finfo(torch.float32).eps, 1e-5, 1e-6, 1e-8, SMALLEST_EPS, 0.0)


def difference(found: Tensor, true: Tensor) -> float:
    """Return the largest difference, relative to the largest true value."""
    true = true.double()
    off = (found.to(true.device).double() - true).abs().max() / true.abs().max().clamp(min=1e-30)
    return off.item()


def factor(a: Tensor, b: Tensor) -> float:
    """Return the number ``c`` for which ``c * b`` is closest to ``a``."""
    a, b = a.double(), b.to(a.device).double()
    return ((a * b).sum() / b.square().sum().clamp(min=1e-300)).item()


def exact_number(measured: float, settings: Mapping[str, Any], tolerance: float = EXACT) -> float:
    """Return 1, a config's number or an inverse of one, if near ``measured``, else ``measured``."""
    own = [float(x) for x in settings.values() if type(x) in (int, float) and x > 0]
    known = [1.0, *own, *(1 / x for x in own)]
    nearest = min(known, key=lambda x: abs(x / measured - 1) if measured else abs(x))
    return nearest if abs(nearest - measured) <= tolerance * abs(measured) else measured


def norm_difference(norm: nn.Module, lens_norm: LensNorm, width: int) -> float:
    """Return how much the results of a module differ from those of a ``LensNorm``.

    Both run on random rows. Half of the rows have size 1, and show a wrong weight. The others have
    size sqrt(eps), and show a wrong eps. The mean of a row is not 0, so RMS norms and layer norms
    differ.
    """
    weight = lens_norm.weight
    rows = torch.randn(16, width, generator=torch.Generator().manual_seed(0)) + 0.5
    small = max(lens_norm.eps, SMALLEST_EPS) ** 0.5
    rows = torch.cat([rows, small * rows]).to(None if weight is None else weight.device)
    whole = copy.deepcopy(norm).float()  # results in 16 bits would hide a wrong eps
    return difference(lens_norm.forward(rows.double())[0], whole(rows[None])[0])


def fit_norm(norm: Any, width: int, settings: Mapping[str, Any]) -> NormFit:
    """Return the kind, eps and offset for which ``LensNorm`` gives the same results as ``norm``.

    Raises:
        ValueError: No known kind, eps and offset give these results.
    """
    own = [x for x in plain_norm(norm) if x is not None]
    if {id(x) for x in norm.parameters()} != {id(x) for x in own}:
        raise ValueError(
            f"the final norm, a {type(norm).__name__}, has other parameters than weight and bias"
        )
    named = [x for name, x in settings.items() if "eps" in name]
    known = [x for x in (*vars(norm).values(), *named) if type(x) is float and 0 <= x < 0.5]
    errors = []
    for eps in dict.fromkeys((*known, *USUAL_EPS)):
        for kind, offset in product(NORM_KINDS, (0.0, 1.0) if own else (0.0,)):
            fit = NormFit(kind, eps, offset)
            errors.append(norm_difference(norm, fit.lens_norm(norm), width))
            # An eps that is wrong by a millionth is noticed, so the first match is right.
            if errors[-1] <= EXACT / 10:
                return fit
    raise ValueError(
        f"the final norm, a {type(norm).__name__}, is neither an RMS norm nor a layer norm with"
        f" a known eps: the nearest differs by {min(errors):.1e} of the largest value"
    )


def probe(run: Trace, decoder: str, sizes: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each size, products of the head up to it and the model's logits for them.

    The decoder does not run again. It returns the same as in ``run``. The products are in float32
    for any dtype of the weights.
    """
    part = run.model.get_submodule(decoder)
    called = run.last(part)
    assert called is not None  # ``run`` has recorded the call of the decoder
    weight = run.head.weight
    ramp = torch.linspace(-1, 1, len(weight), device=weight.device)
    products = torch.stack([size * ramp for size in sizes])

    def put(x: Tensor) -> Tensor:
        result = products.new_zeros(*x.shape[:-1], len(ramp))
        result[..., : len(products), :] = products
        return result

    # Hooks of decoder and head still run, because they may change the logits.
    with (
        replaced_forward(part, lambda *args, **options: called.output),
        replaced_forward(run.head, put),
    ):
        logits = logits_of(run.model, run.ids)[0, : len(products)]
    return zip(products[:, : logits.shape[-1]], logits, strict=True)


def fit_map(run: Trace, decoder: str) -> tuple[float, float | None, int]:
    """Return how a model turns its head's products into logits: scale, cap and number of logits."""
    # The first products are tiny: a soft cap of 2 changes products of 0.06 by 3e-4 of their size.
    (x, near), (y, logits), (z, far) = probe(run, decoder, (6e-4, 60.0, 1e4))
    slope = factor(near, x)
    scale, cap = exact_number(slope, settings_of(run.model)), None
    expected = scale * y
    if not difference(far, slope * z) <= 1e-3:
        cap = exact_number(far.abs().max().item(), settings_of(run.model))
        expected = cap * torch.tanh(expected / cap)
    if not (scale > 0 and difference(expected, logits) <= 1e-3):
        raise ValueError(
            "the logits are neither a multiple of the head's products nor a multiple with a soft"
            " cap"
        )
    return scale, cap, len(logits)
