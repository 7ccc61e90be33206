"""Check that a lens head reproduces the model's own logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens_kernels.hf.model.capture import capture
from lens_kernels.hf.model.families import (
    blocks_of,
    causal_lm_of,
    class_name,
    final_norm_of,
    lens_head_from,
)
from lens_kernels.lens import LensHead


@torch.no_grad()
def verify_lens(model: Any) -> None:
    """Check on a few tokens that the lens of the last block's output gives the model's logits.

    The modules' training modes and the random state are unchanged afterwards.

    Raises:
        ValueError: The lens's logits differ from the model's, or its norm differs from the model's
            norm on small rows, where ``eps`` matters.
    """
    head = lens_head_from(model)
    embedding = causal_lm_of(model).get_input_embeddings().weight
    tokens = torch.arange(4, device=embedding.device)[None] % len(embedding)
    last = len(blocks_of(model))
    # Submodules may be in another mode than the model.
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with capture(model, [last]) as captured:
            logits = model(tokens, use_cache=False, return_dict=True).logits
        verify_lens_head(model, head, captured[last], logits)
        _verify_eps(model, head, captured[last])
    finally:
        for module in training:
            module.training = True


def _verify_eps(model: Any, head: LensHead, final: Tensor) -> None:
    """Compare the norms on rows whose mean square is ``eps``; larger rows hide a wrong ``eps``."""
    assert head.norm is not None
    size = final.float().square().mean(-1, keepdim=True).sqrt()
    rows = (final.float() / size * head.norm.eps**0.5).to(final.dtype)
    normed = final_norm_of(model)(rows)
    _compare(model, "norm", head.norm.forward(rows.float())[0], normed)


@torch.no_grad()
def verify_lens_head(model: Any, head: LensHead, final: Tensor, logits: Tensor) -> None:
    """Check that the lens of the last block's output gives the model's own logits.

    ``final`` is the output of the last block, before the norm. ``logits`` are the model's.
    """
    x = final.float()
    if head.norm is not None:
        x = head.norm.forward(x)[0]
    read, _ = head.logits(x @ head.weight.float().T, 1.0)
    _compare(model, "logits", read, logits)


def _compare(model: Any, what: str, read: Tensor, own: Tensor) -> None:
    largest = own.float().abs().max()
    error = (read - own.float()).abs().max()
    limit = 1e-3 if own.dtype in (torch.float32, torch.float64) else 5e-2
    if not error <= limit * largest:
        raise ValueError(
            f"the lens of {class_name(model)} does not reproduce the model's {what}: they differ by"
            f" {error / largest:.1e} of the largest value. The Family does not describe its"
            " norm or head: correct it and call register_family again, or build a LensHead by hand"
        )
