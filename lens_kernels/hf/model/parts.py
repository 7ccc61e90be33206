"""The parts of a model that make up its lens: their paths, numbers, and requirements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lens_kernels import compat
from lens_kernels.hf.model.families import causal_lm_of, class_name
from lens_kernels.lens import LensHead, LensNorm


@dataclass(frozen=True)
class NormFit:
    """How a norm computes: the arguments of ``LensNorm`` that are not tensors."""

    kind: str
    eps: float
    offset: float

    def lens_norm(self, norm: Any) -> LensNorm:
        """Return the norm of a lens, with the parameters of ``norm``."""
        weight, bias = plain_norm(norm)
        return LensNorm(self.kind, weight, bias, eps=self.eps, offset=self.offset)


@dataclass(frozen=True)
class ModelLens:
    """The paths and numbers of a model's lens. Paths start at the causal language model.

    ``logits = softcap * tanh(s / softcap)``, or ``s`` without a soft cap, where
    ``s = scale * head(multiple * norm(h))`` and ``h`` is the last block's output.

    Attributes:
        blocks: Path of the ``nn.ModuleList`` of blocks.
        indices: Indices of the blocks that run.
        norm: Path of the final norm, or None if there is none.
        decoder: Path of the module that returns the normed final states without running the head.
        norm_fit: Kind, eps and offset of the norm.
        multiple: The number that multiplies the normed states before the head; part of ``s``.
        scale: The number that multiplies the head's products.
        softcap: The soft cap, or None.
        vocab_size: Number of logits; fewer than the head's rows if the model leaves some out.
    """

    blocks: str
    indices: tuple[int, ...]
    norm: str | None
    decoder: str
    norm_fit: NormFit | None
    multiple: float
    scale: float
    softcap: float | None
    vocab_size: int

    def blocks_in(self, model: Any) -> list[nn.Module]:
        """Return the blocks that run, in order."""
        blocks = [*causal_lm_of(model).get_submodule(self.blocks).children()]
        return [blocks[i] for i in self.indices]

    def norm_in(self, model: Any) -> nn.Module | None:
        """Return the norm between the last block and the head."""
        return None if self.norm is None else causal_lm_of(model).get_submodule(self.norm)

    def decoder_in(self, model: Any) -> nn.Module:
        """Return the part of the model that returns the normed final hidden state."""
        part: nn.Module = causal_lm_of(model).get_submodule(self.decoder)
        return part

    def head_in(self, model: Any) -> LensHead:
        """Return the lens head, which shares the model's parameters."""
        head, norm = plain_head(model), self.norm_in(model)
        lens_norm = None if self.norm_fit is None else self.norm_fit.lens_norm(norm)
        scale = self.scale * self.multiple
        lens = LensHead(head.weight, head.bias, lens_norm, scale, self.softcap)
        return lens.prefix(self.vocab_size)


def plain_head(model: Any) -> Any:
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


def plain_norm(norm: Any) -> tuple[Tensor | None, Tensor | None]:
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
