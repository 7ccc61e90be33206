"""The paths of the modules that make up a model's lens, and the modules at these paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lens_kernels import compat
from lens_kernels.hf.model.families import class_name
from lens_kernels.hf.model.fitting import MapFit, NormFit
from lens_kernels.lens import LensHead, LensNorm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelLens:
    """The paths and numbers of a model's lens. Paths start at the causal language model.

    ``logits = softcap * tanh(s / softcap)``, or ``s`` without a soft cap, where
    ``s = scale * head(norm(h))`` and ``h`` is the last block's output.

    Attributes:
        blocks: Path of the ``nn.ModuleList`` of blocks.
        indices: Indices of the blocks that run.
        norm: Path of the final norm, or None if there is none.
        decoder: Path of the module that returns the normed final states without running the head.
        norm_fit: Kind, eps and offset of the norm.
        map: How the head's products become logits: scale, soft cap, and number of logits.
        multiple: The number that multiplies the normed states before the head; part of ``scale``.
    """

    blocks: str
    indices: tuple[int, ...]
    norm: str | None
    decoder: str
    norm_fit: NormFit | None
    map: MapFit
    multiple: float = 1.0

    def blocks_in(self, model: PreTrainedModel) -> list[nn.Module]:
        """Return the blocks that run, in order."""
        blocks = block_list(model, self.blocks)
        return [blocks[i] for i in self.indices]

    def norm_in(self, model: PreTrainedModel) -> nn.Module | None:
        """Return the norm between the last block and the head."""
        return None if self.norm is None else submodule(model, self.norm, "norm")

    def decoder_in(self, model: PreTrainedModel) -> nn.Module:
        """Return the part of the model that returns the normed final hidden state."""
        return submodule(model, self.decoder, "blocks")

    def head_in(self, model: PreTrainedModel) -> LensHead:
        """Return the lens head, which shares the model's parameters."""
        head, norm = plain_head(model), self.norm_in(model)
        lens_norm = None
        fit = self.norm_fit
        if fit is not None and norm is not None:
            weight, bias = plain_norm(norm)
            lens_norm = LensNorm(fit.kind, weight, bias, eps=fit.eps, offset=fit.offset)
        scale = self.map.scale * self.multiple
        lens = LensHead(head.weight, head.bias, lens_norm, scale, self.map.softcap)
        return lens.prefix(self.map.vocab_size)


def submodule(model: PreTrainedModel, path: str, field: str) -> nn.Module:
    """Return the module at a path. Error messages call the path ``Family.<field>``."""
    try:
        part: nn.Module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"{class_name(model)} has no module {path!r}, as Family.{field} says: pass a causal"
            " language model with its head, or correct the family with register_family"
        ) from error
    return part


def block_list(model: PreTrainedModel, path: str) -> nn.ModuleList:
    """Return the list of blocks at a path."""
    blocks = submodule(model, path, "blocks")
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(
            f"{path!r} of {class_name(model)} must be the nn.ModuleList of its blocks, got"
            f" {type(blocks).__name__}: correct its Family.blocks"
        )
    return blocks


def plain_head(model: PreTrainedModel) -> nn.Linear:
    """Return the model's head. It must be one ``nn.Linear`` with a plain weight."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.ModuleList):
        raise TypeError(
            f"{class_name(model)} has {len(head)} heads, and a lens has one: build a LensHead from"
            " the head that you compare"
        )
    if compat.class_before_sharding(head) is not nn.Linear:
        raise TypeError(
            f"the model's head is a {type(head).__name__}, not a plain nn.Linear: merge the adapter"
            " (merge_and_unload) or leave the head out of target_modules and modules_to_save;"
            " dequantise a quantised head; pass a causal language model with its head"
        )
    _check_weight("head", head.weight)
    return head


def plain_norm(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight and the bias of a norm. Each may be None."""
    # A wrapper, such as an adapter or a parametrisation, has the norm as a child. The wrapper's own
    # weight attribute may not be the weight that is used.
    if any(True for _ in norm.children()):
        raise TypeError(
            f"the model's final norm is a {type(norm).__name__}, not a plain norm: merge the"
            " adapter (merge_and_unload), or leave the norm out of target_modules and"
            " modules_to_save"
        )
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    for x in (weight, bias):
        if x is not None:
            _check_weight("final norm", x)
    return weight, bias


def _check_weight(part: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(
            f"the weight of the model's {part} is on the meta device, so lenses cannot read it:"
            " load the model without offloading, or keep this part on a device in device_map"
        )
    # Quantised and sharded weights are subclasses of Tensor, and do not hold plain values.
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout is torch.strided
    if not (plain and weight.is_floating_point()):
        raise TypeError(
            f"the weight of the model's {part} must be a dense floating-point tensor, got a"
            f" {type(weight).__name__} of {weight.dtype}, {weight.layout}: dequantise or gather it"
        )
