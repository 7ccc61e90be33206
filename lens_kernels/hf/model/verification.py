"""Check that a lens head reproduces the model's own logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lens_kernels.hf.model.capture import capture
from lens_kernels.hf.model.families import (
    blocks_of,
    causal_lm_of,
    class_name,
    final_norm_of,
    lens_head_from,
)
from lens_kernels.hf.model.state import evaluating, without_autocast
from lens_kernels.lens import LensHead

# The largest products of the head in each probe. Large ones show a soft cap. Any of them shows a
# scale.
PROBES = (1.0, 60.0, 1000.0)


@torch.no_grad()
def verify_lens(model: Any) -> None:
    """Check on a few tokens that the lens of the last block's output gives the model's logits.

    There are three checks. The first one applies the whole lens to the model's own hidden states.
    The second one compares the norms on random rows of size 1, and of a size for which ``eps``
    matters. The third one replaces the products of the head by given numbers, to compare scale and
    soft cap. The model's own logits may be too small for the soft cap to matter.

    Autocast around the call has no effect. The training modes of modules and the random state are
    unchanged afterwards.

    Raises:
        ValueError: The lens's logits differ from the model's, or its norm from the model's norm.
    """
    head = lens_head_from(model)
    with evaluating(model), without_autocast(head.weight.device):
        _verify_logits(model, head)
        _verify_norm(model, head)
        _verify_map(model, head)


def _verify_logits(model: Any, head: LensHead) -> None:
    last = len(blocks_of(model))
    # accelerate can wrap the forward of a model in autocast. A context around it cannot disable
    # that, so a hook looks whether autocast is on.
    rounded = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        rounded.append(torch.is_autocast_enabled(head.weight.device.type))

    hook = causal_lm_of(model).get_output_embeddings().register_forward_hook(note)
    try:
        with capture(model, [last]) as captured:
            logits = _logits(model, head)
    finally:
        hook.remove()
    verify_lens_head(model, head, captured[last], logits, rounded=any(rounded))


def _logits(model: Any, head: LensHead) -> Tensor:
    tokens = torch.arange(4, device=head.weight.device)[None] % len(head.weight)
    logits: Tensor = model(tokens, use_cache=False, return_dict=True).logits
    return logits


def _verify_norm(model: Any, head: LensHead) -> None:
    """Compare the norms on random rows. Rows of size 1 alone would not show a wrong ``eps``."""
    assert head.norm is not None and head.norm.weight is not None
    weight = head.norm.weight
    rows = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    for size in (1.0, head.norm.eps**0.5):
        x = (size * rows).to(weight.device, weight.dtype)
        _compare(model, "norm", head.norm.forward(x.float())[0], final_norm_of(model)(x), weight)


def _verify_map(model: Any, head: LensHead) -> None:
    """Compare the maps from the head's products to logits, with given numbers as products."""
    for size in PROBES:
        ramp = torch.linspace(-size, size, len(head.weight), device=head.weight.device)
        put = ramp if head.bias is None else ramp + head.bias.float()

        def replace(module: nn.Module, args: Any, output: Tensor, put: Tensor = put) -> Tensor:
            return put.expand(output.shape)

        hook = causal_lm_of(model).get_output_embeddings().register_forward_hook(replace)
        try:
            own = _logits(model, head)
        finally:
            hook.remove()
        # The products are float32 for any dtype of the weights, so the check can be strict.
        _compare(model, "logits", head.logits(ramp.clone(), 1.0)[0], own[0, -1], own)


@torch.no_grad()
def verify_lens_head(
    model: Any, head: LensHead, final: Tensor, logits: Tensor, rounded: bool = False
) -> None:
    """Check that the lens of the last block's output gives the model's own logits.

    ``final`` is the output of the last block, before the norm. ``logits`` are the model's logits.
    ``rounded`` says whether the model computed them under autocast.
    """
    x = final.float()
    if head.norm is not None:
        x = head.norm.forward(x)[0]
    read, _ = head.logits(x @ head.weight.float().T, 1.0)
    # A model with 16-bit weights may return float32 logits. They have the rounding of 16 bits.
    _compare(model, "logits", read, logits, logits, head.weight, rounded=rounded)


def _compare(
    model: Any, what: str, read: Tensor, own: Tensor, *computed: Tensor, rounded: bool = False
) -> None:
    """Raise if ``read`` and ``own`` differ by more than the rounding of the dtypes ``computed``."""
    largest = own.float().abs().max()
    error = (read - own.float()).abs().max()
    exact = not rounded and all(x.dtype in (torch.float32, torch.float64) for x in computed)
    if not error <= (1e-3 if exact else 5e-2) * largest:
        raise ValueError(
            f"the lens of {class_name(model)} does not reproduce the model's {what}: they differ by"
            f" {error / largest:.1e} of the largest value. The Family does not describe its"
            " norm or head: correct it and call register_family again, or build a LensHead by hand"
        )
