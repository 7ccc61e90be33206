"""Checks that a lens gives the model's own logits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lens_kernels.hf.model.families import REGISTERED, class_name
from lens_kernels.hf.model.fitting import (
    difference,
    in_float32,
    logits_of_products,
    norm_difference,
)
from lens_kernels.hf.model.parts import ModelLens
from lens_kernels.hf.model.tracing import Trace
from lens_kernels.lens import LensHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The largest product of the head in each run. Only large products reveal a soft cap, but a scale
# shows in all of them.
PROBES = (1.0, 60.0, 1000.0)


def check_lens(model: PreTrainedModel, inner: PreTrainedModel, lens: ModelLens, run: Trace) -> None:
    """Check that the lens of the last block's output gives the model's logits in ``run``.

    There are three checks. The first check applies the whole lens to the model's own hidden states.
    The second check compares the norms on random rows, some so small that ``eps`` matters. The
    third check compares scale and soft cap on chosen products of the head, because the model's own
    logits may be too small for the soft cap to matter.

    The caller sets the model's mode, with ``state.measured``.

    Raises:
        ValueError: The lens's logits differ from the model's, or its norm from the model's norm.
    """
    head = lens.head_in(inner)
    error = difference(_read(inner, lens, head, run), run.logits)
    _accept(inner, "logits", error, _exact(head, run))
    norm = lens.norm_in(inner)
    if norm is not None and head.norm is not None:
        error = norm_difference(in_float32(norm), head.norm, head.weight.shape[1])
        _accept(inner, "norm", error, exact=True)
    _check_map(model, inner, lens, replace(head, scale=lens.map.scale), run)


def _read(inner: PreTrainedModel, lens: ModelLens, head: LensHead, run: Trace) -> Tensor:
    call = run.last(lens.blocks_in(inner)[-1])
    if call is None or call.returned is None:
        raise ValueError(
            f"the last block in {lens.blocks!r} of {class_name(inner)} does not run, so its lens"
            " cannot be compared with the logits"
        )
    weight = head.weight
    x = call.returned.to(weight.device).float()
    if head.norm is not None:
        x = head.norm.forward(x)[0]
    # The weight may be too large for a copy in float32.
    products = nn.functional.linear(x.to(weight.dtype), weight)
    return head.logits(products.float(), 1.0)[0]


def _exact(head: LensHead, run: Trace) -> bool:
    """Return whether the logits are never rounded to 16 bits.

    A model with 16-bit weights may return float32 logits that were rounded before.
    """
    return run.autocast is None and min(run.logits.itemsize, head.weight.itemsize) >= 4


def _check_map(
    model: PreTrainedModel, inner: PreTrainedModel, lens: ModelLens, head: LensHead, run: Trace
) -> None:
    """Compare how the lens and the model turn chosen products of the head into logits."""
    module = inner.get_output_embeddings()
    ramp = torch.linspace(-1, 1, len(module.weight), device=head.weight.device)
    ramps = torch.stack([size * ramp for size in PROBES])
    put = ramps if module.bias is None else ramps + module.bias.float()
    # The products are float32 for any dtype of the weights, so only small differences are allowed.
    logits = logits_of_products(model, inner, run, lens.decoder, put)
    for x, own in zip(ramps, logits, strict=True):
        read = head.logits(x[: len(head.weight)].clone(), 1.0)[0]
        _accept(inner, "logits", difference(read, own), own.dtype.itemsize >= 4)


def _accept(inner: PreTrainedModel, what: str, error: float, exact: bool) -> None:
    """Raise if an error, relative to the largest value, exceeds what rounding can explain."""
    if not error <= (1e-3 if exact else 5e-2):
        hint = (
            "The registered Family does not describe its norm or head: correct it and call"
            " register_family again"
            if inner.config.model_type in REGISTERED
            else "Something acts between its last block and its logits that no lens has"
        )
        raise ValueError(
            f"the lens of {class_name(inner)} does not reproduce the model's {what}: they differ by"
            f" {error:.1e} of the largest value. {hint}, or build a LensHead by hand"
        )
