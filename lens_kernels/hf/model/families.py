"""Model families: the paths of blocks and final norm, and how logits are computed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lens_kernels import compat
from lens_kernels.lens import NORM_KINDS, LensHead, LensNorm
from lens_kernels.options import check_number


@dataclass(frozen=True)
class Family:
    """A description of how causal language models compute logits from the last block's output h.

    ``s = scale * head(norm(h))`` and ``logits = softcap * tanh(s / softcap)``, or ``logits = s``
    without a soft cap. ``head`` is ``model.get_output_embeddings()``.

    Attributes:
        blocks: Path of the ``nn.ModuleList`` of blocks, from the causal language model.
        norm: Path of the norm between the last block and the head. Its eps is the attribute
            ``variance_epsilon`` or ``eps``, its bias the attribute ``bias``.
        norm_kind: ``"rms"`` or ``"layer"``.
        norm_offset: Number that the norm adds to its weight; 1 in Gemma.
        logit_scale: Name of the config entry that multiplies the logits.
        logit_divisor: Name of the config entry that divides the logits.
        softcap: Name of the config entry that holds the soft cap. If the entry is None, the model
            has no cap.
    """

    blocks: str
    norm: str
    norm_kind: str
    norm_offset: float = 0.0
    logit_scale: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = None

    def __post_init__(self) -> None:
        """Check types here, so that an error appears before a model is read."""
        for name in ("blocks", "norm", "norm_kind", "logit_scale", "logit_divisor", "softcap"):
            value = getattr(self, name)
            optional = type(self).__dataclass_fields__[name].default is None
            if not (isinstance(value, str) or (optional and value is None)):
                expected = "a string or None" if optional else "a string"
                raise TypeError(f"Family.{name} must be {expected}, got {type(value).__name__}")
        check_number("Family.norm_offset", self.norm_offset, float("-inf"))
        if self.norm_kind not in NORM_KINDS:
            raise ValueError(
                f"Family.norm_kind={self.norm_kind!r} is unknown; choose 'rms' or 'layer'"
            )


_LLAMA = Family("model.layers", "model.norm", "rms")
_GEMMA = Family(
    "model.layers", "model.norm", "rms", norm_offset=1.0, softcap="final_logit_softcapping"
)

FAMILIES = {
    "llama": _LLAMA,  # TinyLlama and SmolLM2 have this type too
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "granite": Family("model.layers", "model.norm", "rms", logit_divisor="logits_scaling"),
    "cohere": Family("model.layers", "model.norm", "layer", logit_scale="logit_scale"),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    # The multimodal model's forward ignores the soft cap of its text config.
    "gemma3": Family(
        "model.language_model.layers", "model.language_model.norm", "rms", norm_offset=1.0
    ),
    "gpt2": Family("transformer.h", "transformer.ln_f", "layer"),
    "gpt_neox": Family("gpt_neox.layers", "gpt_neox.final_layer_norm", "layer"),
    "opt": Family("model.decoder.layers", "model.decoder.final_layer_norm", "layer"),
}


def register_family(model_type: str, family: Family) -> None:
    """Register the family of models with this ``config.model_type``. It replaces an earlier one.

    ``verify_lens(model)`` then checks the family against a model.

    Raises:
        TypeError: ``model_type`` is not a string, or ``family`` is not a ``Family``.
    """
    if not isinstance(model_type, str):
        raise TypeError(
            "model_type must be a string, the config.model_type of the models, got"
            f" {type(model_type).__name__}"
        )
    if not isinstance(family, Family):
        raise TypeError(f"family must be a Family, got {type(family).__name__}")
    FAMILIES[model_type] = family


def causal_lm_of(model: Any) -> Any:
    """Return the model inside a peft model, or the model itself.

    Raises:
        TypeError: An adapter prepends virtual tokens. The hidden states would then have more
            positions than the labels and the other model's hidden states.
    """
    # Importing peft takes seconds. If it has not been imported, the model is no peft model.
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise TypeError(
                f"model has the adapter {name!r} of kind {config.peft_type.value}, whose virtual"
                " tokens shift the positions of its hidden states; use an adapter without virtual"
                " tokens, such as LoRA"
            )
    return model.base_model.model


def family_of(model: Any) -> Family:
    """Return the family of a model. For an unknown type, the error explains how to register it."""
    kind = causal_lm_of(model).config.model_type
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"model type {kind!r} is not known to lens_kernels (known: {known}). Register it:"
            f" lens_kernels.hf.register_family({kind!r}, Family(blocks='model.layers',"
            " norm='model.norm', norm_kind='rms')); or build a LensHead from the model's final norm"
            " and head, and call symmetric_lens_loss or distillation_loss directly"
        )
    return FAMILIES[kind]


def decoder_of(model: Any) -> nn.Module:
    """Return the model without its head. Its output is the normed final hidden state."""
    inner = causal_lm_of(model)
    # Gemma 3's base_model_prefix is wrong in some versions, where base_model is the model itself.
    decoder: nn.Module = inner.model if inner.base_model is inner else inner.base_model
    return decoder


def blocks_of(model: Any) -> nn.ModuleList:
    """Return the model's blocks in order."""
    path = family_of(model).blocks
    blocks = _part(model, path, "blocks")
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(
            f"{path!r} of {class_name(model)} must be the nn.ModuleList of its blocks, got"
            f" {type(blocks).__name__}: correct Family.blocks of its family"
        )
    return blocks


def final_norm_of(model: Any) -> nn.Module:
    """Return the norm between the last block and the head."""
    return _part(model, family_of(model).norm, "norm")


def _part(model: Any, path: str, field: str) -> nn.Module:
    try:
        part: nn.Module = causal_lm_of(model).get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"{class_name(model)} has no module {path!r}, as Family.{field} says: pass a causal"
            " language model with its head, or correct the family with register_family. An OPT"
            " model without do_layer_norm_before has no final norm, so it has no lens"
        ) from error
    return part


def class_name(model: Any) -> str:
    """Return the name of the model's class, for error messages."""
    return type(causal_lm_of(model)).__name__


def lens_head_from(model: Any) -> LensHead:
    """Return the lens head of a Hugging Face causal language model.

    The head shares the model's parameters. Scale and soft cap are read from the config, and do not
    follow later changes of the config. ``model`` may be a peft model.

    Raises:
        ValueError: The model's family is unknown, or the config has no entry that the family
            names, or there is a projection between final norm and head.
        TypeError: The head or the final norm is quantised, sharded or wrapped by an adapter.
    """
    family, inner = family_of(model), causal_lm_of(model)
    head = inner.get_output_embeddings()
    if compat.class_before_sharding(head) is not nn.Linear:
        raise TypeError(
            f"the model's head is a {type(head).__name__}, not a plain nn.Linear: merge the adapter"
            " (merge_and_unload) or leave the head out of target_modules and modules_to_save;"
            " dequantise a quantised head"
        )
    _check_weight("head", head.weight)
    norm = _norm_from(final_norm_of(model), family)
    assert norm.weight is not None
    if head.weight.shape[1] != norm.weight.shape[0]:
        raise ValueError(
            f"the final norm of {class_name(model)} has width {norm.weight.shape[0]}, its head"
            f" {head.weight.shape[1]}: there is a projection between them (in OPT,"
            " word_embed_proj_dim), which a lens head does not have. Build a LensHead from the"
            " product of both weights"
        )
    scale = _setting(inner, family.logit_scale, 1.0) / _setting(inner, family.logit_divisor, 1.0)
    return LensHead(head.weight, head.bias, norm, scale, _setting(inner, family.softcap, None))


def _norm_from(norm: Any, family: Family) -> LensNorm:
    # Wrappers (adapters, modules_to_save, parametrisations) have the norm as a child. They are
    # refused, because their attribute ``weight`` may not be the weight that they use.
    if any(True for _ in norm.children()) or getattr(norm, "weight", None) is None:
        raise TypeError(
            f"the model's final norm is a {type(norm).__name__}, not a plain norm with a weight:"
            " merge the adapter (merge_and_unload), or leave the norm out of target_modules and"
            " modules_to_save"
        )
    _check_weight("final norm", norm.weight)
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            eps = getattr(norm, name)
            bias = getattr(norm, "bias", None)
            return LensNorm(family.norm_kind, norm.weight, bias, eps=eps, offset=family.norm_offset)
    raise TypeError(
        f"the model's final norm, a {type(norm).__name__}, has neither variance_epsilon nor eps:"
        " build a LensHead by hand"
    )


def _check_weight(part: str, weight: Tensor) -> None:
    # Quantised and sharded weights are subclasses of Tensor that do not hold plain values.
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout is torch.strided
    if not (plain and weight.is_floating_point()):
        raise TypeError(
            f"the weight of the model's {part} must be a dense floating-point tensor, got a"
            f" {type(weight).__name__} of {weight.dtype}, {weight.layout}: dequantise or gather it"
        )


def _setting(model: Any, name: str | None, default: Any) -> Any:
    if name is None:
        return default
    config = model.config.get_text_config()
    if not hasattr(config, name):
        raise ValueError(
            f"the config of {class_name(model)} has no entry {name!r}, as its Family says: correct"
            " the Family and call register_family again"
        )
    return getattr(config, name)
