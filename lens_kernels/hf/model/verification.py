"""Checks that a lens gives the model's own logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lens_kernels.hf.model.families import REGISTERED, causal_lm_of, class_name
from lens_kernels.hf.model.fitting import (
    in_float32,
    logits_of_products,
    norm_rows,
    norm_sizes,
)
from lens_kernels.hf.model.parts import ModelLens
from lens_kernels.hf.model.tracing import sample_tokens, trace
from lens_kernels.lens import LensHead

# For each probe, the largest product that the head returns. Only large products reveal a soft cap,
# but all reveal a scale.
PROBES = (1.0, 60.0, 1000.0)


def check_lens(model: Any, lens: ModelLens) -> None:
    """Check on a few tokens that the lens of the last block's output gives the model's logits.

    There are three checks. The first applies the whole lens to the model's own hidden states. The
    second compares the norms on random rows of size 1, and of a size at which ``eps`` matters. The
    third replaces the head's products by given numbers, to compare scale and soft cap. The model's
    own logits may be too small for the soft cap to matter.

    The caller sets the model's mode: see ``state.measured``.

    Raises:
        ValueError: The lens's logits differ from the model's, or its norm from the model's norm.
    """
    inner = causal_lm_of(model)
    head = lens.head_in(inner)
    _check_logits(model, lens, head)
    _check_norm(model, lens, head)
    _check_map(model, lens, replace(head, scale=lens.map.scale))


def _check_logits(model: Any, lens: ModelLens, head: LensHead) -> None:
    inner = causal_lm_of(model)
    run = trace(model, inner, sample_tokens(inner, len(head.weight), head.weight.device))
    call = run.last(lens.blocks_in(inner)[-1])
    if call is None or call.returned is None:
        raise ValueError(
            f"the last block in {lens.blocks!r} of {class_name(model)} does not run, so its lens"
            " cannot be compared with the logits"
        )
    x = call.returned.to(head.weight.device).float()
    if head.norm is not None:
        x = head.norm.forward(x)[0]
    read, _ = head.logits(x @ head.weight.float().T, 1.0)
    # A model with 16-bit weights may return float32 logits, which are rounded nevertheless.
    dtypes = () if run.autocast else (run.logits.dtype, head.weight.dtype)
    _compare(model, "logits", read, run.logits, *dtypes)


def _check_norm(model: Any, lens: ModelLens, head: LensHead) -> None:
    """Compare the norms on random rows. Rows of size 1 alone would hide a wrong ``eps``."""
    norm = lens.norm_in(causal_lm_of(model))
    if norm is None or head.norm is None:
        return
    whole, device = in_float32(norm), head.weight.device
    for size in norm_sizes(head.norm.eps):
        x = norm_rows(head.weight.shape[1], size, device)
        _compare(model, "norm", head.norm.forward(x)[0], whole(x[None])[0], torch.float32)


def _check_map(model: Any, lens: ModelLens, head: LensHead) -> None:
    """Compare the maps from the head's products to logits, with given numbers as products."""
    inner = causal_lm_of(model)
    module = inner.get_output_embeddings()
    ids = sample_tokens(inner, len(head.weight), head.weight.device)
    ramp = torch.linspace(-1, 1, len(module.weight), device=head.weight.device)
    ramps = torch.stack([size * ramp for size in PROBES])
    put = ramps if module.bias is None else ramps + module.bias.float()
    # The products are float32 whatever the dtype of the weights is, so the check can be strict.
    for x, own in zip(ramps, logits_of_products(model, module, ids, put), strict=True):
        read = head.logits(x[: len(head.weight)].clone(), 1.0)[0]
        _compare(model, "logits", read, own, own.dtype)


def _compare(model: Any, what: str, read: Tensor, own: Tensor, *dtypes: torch.dtype) -> None:
    """Raise an error if ``read`` and ``own`` differ by more than the rounding of ``dtypes``.

    Without dtypes, a larger difference is allowed.
    """
    largest = own.float().abs().max()
    error = (read.to(own.device) - own.float()).abs().max()
    exact = bool(dtypes) and all(x in (torch.float32, torch.float64) for x in dtypes)
    if not error <= (1e-3 if exact else 5e-2) * largest:
        kind = causal_lm_of(model).config.model_type
        hint = (
            "The registered Family does not describe its norm or head: correct it and call"
            " register_family again"
            if kind in REGISTERED
            else "Something acts between its last block and its logits that no lens has"
        )
        raise ValueError(
            f"the lens of {class_name(model)} does not reproduce the model's {what}: they differ by"
            f" {error / largest:.1e} of the largest value. {hint}, or build a LensHead by hand"
        )
