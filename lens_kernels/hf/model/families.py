"""Model families that users register, for models whose lens cannot be detected."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lens_kernels.lens import NORM_KINDS
from lens_kernels.options import check_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """A description of how causal language models compute logits from the last block's output h.

    ``s = scale * head(norm(h))`` and ``logits = softcap * tanh(s / softcap)``, or ``s`` without a
    soft cap. ``head`` is ``model.get_output_embeddings()``. A registered family replaces detection.
    Its lens, too, is compared with the model's own logits.

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

    Raises:
        TypeError: An entry has another type.
        ValueError: ``norm_kind`` is unknown, or ``norm_offset`` is not finite.
    """

    blocks: str
    norm: str
    norm_kind: str
    norm_offset: float = 0.0
    logit_scale: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = None

    def __post_init__(self) -> None:
        """Check the types of the fields now, before any model is read."""
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


REGISTERED: dict[str, Family] = {}


def register_family(model_type: str, family: Family) -> None:
    """Register ``family`` for the models whose ``config.model_type`` is ``model_type``.

    The new family replaces an earlier one. It is needed only if ``detect_lens`` finds no lens.

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
    REGISTERED[model_type] = family


def causal_lm_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside a peft model, or the model itself.

    Raises:
        TypeError: An adapter prepends virtual tokens. The hidden states would then have more
            positions than the labels and the other model's hidden states.
    """
    # Importing peft takes seconds. If it has not been imported, no model is a peft model.
    peft = sys.modules.get("peft")
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


def input_embeddings(model: PreTrainedModel) -> Tensor:
    """Return the weight of a model's token embeddings."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def embedded_ids(model: PreTrainedModel) -> int:
    """Return the number of token ids that have an embedding."""
    # ``num_embeddings`` comes first, because a weight that DeepSpeed partitions has no rows.
    return getattr(model.get_input_embeddings(), "num_embeddings", len(input_embeddings(model)))


def class_name(model: PreTrainedModel) -> str:
    """Return the name of a model's class, for error messages."""
    return type(causal_lm_of(model)).__name__
