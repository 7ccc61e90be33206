"""All knowledge of model architectures: where blocks, final norm and head are, and what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lens_kernels.lens import LensHead, LensNorm


@dataclass(frozen=True)
class Family:
    """Where a model keeps its parts: attributes of its decoder, and the kind of its final norm."""

    blocks: str
    norm: str
    norm_kind: str


LLAMA = Family(blocks="layers", norm="norm", norm_kind="rms")

# Only families whose logits are head(norm(last block)) without scale or cap stand here.
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt2": Family(blocks="h", norm="ln_f", norm_kind="layer"),
}


def family_of(model: Any) -> Family:
    """Return the family of a causal language model, or raise and say how to go on."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"model type {kind!r} is not known to lens_kernels (known: {known}). Build a LensHead"
            " from the model's final norm and head, and call symmetric_lens_loss or"
            " distillation_loss directly"
        )
    return FAMILIES[kind]


def decoder_of(model: Any) -> nn.Module:
    """Return the stack of blocks with its embeddings and final norm."""
    decoder = getattr(model, model.base_model_prefix)
    assert isinstance(decoder, nn.Module)
    return decoder


def blocks_of(model: Any) -> nn.ModuleList:
    """Return the model's blocks in order."""
    blocks = getattr(decoder_of(model), family_of(model).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def final_norm_of(model: Any) -> nn.Module:
    """Return the norm between the last block and the head."""
    norm = getattr(decoder_of(model), family_of(model).norm)
    assert isinstance(norm, nn.Module)
    return norm


def lens_head_from(model: Any) -> LensHead:
    """Return the logit lens of a Hugging Face causal language model, sharing its parameters.

    Raises:
        ValueError: The model's family is not known.
        TypeError: The head is not a plain linear layer (quantised, or wrapped by an adapter), so
            that its weight alone would not say what it computes.
    """
    family = family_of(model)
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise TypeError(
            f"the model's head is a {type(head).__name__}, not a plain nn.Linear: merge the adapter"
            " or dequantise the head first"
        )
    norm: Any = final_norm_of(model)
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps")  # noqa: B009
    bias = getattr(norm, "bias", None)
    lens_norm = LensNorm(family.norm_kind, norm.weight, bias, eps=eps)
    return LensHead(head.weight, head.bias, lens_norm)


@torch.no_grad()
def verify_lens_head(model: Any, head: LensHead, final: Tensor, logits: Tensor) -> None:
    """Check that the lens reads the last block's output as the model itself does.

    ``final`` is the output of the last block, before the norm, and ``logits`` the model's own.
    """
    x = final.float()
    if head.norm is not None:
        x = head.norm.forward(x)[0]
    read, _ = head.logits(x @ head.weight.float().T, 1.0)
    error = (read - logits.float()).abs().max() / logits.float().abs().max()
    limit = 1e-3 if logits.dtype == torch.float32 else 5e-2
    if not error <= limit:
        raise ValueError(
            f"the lens of {type(model).__name__} does not reproduce the model's logits: they differ"
            f" by {error:.1e} of the largest. Its norm or head does more than lens_kernels knows"
        )
