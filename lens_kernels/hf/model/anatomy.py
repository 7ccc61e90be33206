"""Finds the blocks, decoder and lens head of a model, and remembers them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from lens_kernels.hf.model.detection import find_decoder, find_lens, traced
from lens_kernels.hf.model.families import REGISTERED, Family, causal_lm_of, class_name
from lens_kernels.hf.model.fitting import MapFit, NormFit, settings_of
from lens_kernels.hf.model.parts import ModelLens, block_list, plain_norm, submodule
from lens_kernels.hf.model.state import measured
from lens_kernels.hf.model.tracing import Trace
from lens_kernels.hf.model.verification import check_lens
from lens_kernels.lens import LensHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Maps each model to its lens, and to the numbers and modules on which the lens depends.
_FOUND: WeakKeyDictionary[nn.Module, tuple[list[object], ModelLens]] = WeakKeyDictionary()


def detect_lens(model: PreTrainedModel) -> ModelLens:
    """Return the lens of a causal language model: its blocks, norm and head, scale and soft cap.

    The model reads a few tokens, in evaluation mode and without gradients, and is unchanged
    afterwards. If a ``Family`` is registered for the model's type, the family names the blocks and
    the norm. The lens is always compared with the model's own logits. The result is remembered
    until the model's parts or config change. ``model`` may be a peft model.

    Raises:
        ValueError: The model has no lens (the message says why), a registered family does not
            reproduce its logits, or its weights are on the meta device.
        TypeError: The head or the final norm is quantised, sharded or wrapped by an adapter.
    """
    inner = causal_lm_of(model)
    known = _remembered(inner)
    return _find(model, inner) if known is None else known


def verify_lens(model: PreTrainedModel) -> None:
    """Compare a model's lens with the model's own logits, even if they were compared before.

    Raises:
        ValueError: The lens's logits differ from the model's, or its norm from the model's norm.
    """
    inner = causal_lm_of(model)
    known = _remembered(inner)
    if known is None:
        _find(model, inner)
    else:
        measured(inner, lambda: _check_known(model, inner, known))


def _check_known(model: PreTrainedModel, inner: PreTrainedModel, lens: ModelLens) -> None:
    parts = lens.blocks_in(inner)[-1], lens.decoder_in(inner)
    check_lens(model, inner, lens, traced(model, inner, parts))


def _find(model: PreTrainedModel, inner: PreTrainedModel) -> ModelLens:
    family = REGISTERED.get(inner.config.model_type)

    def search() -> ModelLens:
        run = traced(model, inner)
        if family is None:
            found = find_lens(model, inner, run)
        else:
            found = _named_lens(inner, family, run)
        check_lens(model, inner, found, run)
        return found

    found = measured(inner, search)
    _FOUND[inner] = _depends_on(inner, found), found
    return found


def _remembered(inner: PreTrainedModel) -> ModelLens | None:
    if inner not in _FOUND:
        return None
    parts, found = _FOUND[inner]
    try:
        return found if parts == _depends_on(inner, found) else None
    except ValueError:  # the model no longer has a part of the lens
        return None


def _depends_on(inner: PreTrainedModel, lens: ModelLens) -> list[object]:
    """Return the modules and numbers that a lens depends on. Modules are compared by identity."""
    norm = lens.norm_in(inner)
    settings = settings_of(inner).items()
    return [
        REGISTERED.get(inner.config.model_type),
        inner.get_output_embeddings(),
        norm,
        *submodule(inner, lens.blocks, "blocks").children(),
        *(x for x in (() if norm is None else vars(norm).values()) if type(x) is float),
        *(x for x in settings if type(x[1]) in (int, float) and "token" not in x[0]),
    ]


def _named_lens(inner: PreTrainedModel, family: Family, run: Trace) -> ModelLens:
    blocks = block_list(inner, family.blocks)
    norm = submodule(inner, family.norm, "norm")
    plain_norm(norm)
    names = [name for name in ("variance_epsilon", "eps") if hasattr(norm, name)]
    if not names:
        raise TypeError(
            f"the model's final norm, a {type(norm).__name__}, has neither variance_epsilon nor"
            " eps: build a LensHead by hand"
        )
    called = run.last(norm)
    if called is None or called.returned is None:
        raise ValueError(
            f"{class_name(inner)} does not call {family.norm!r}, which its Family.norm names"
        )
    scale = _setting(inner, family.logit_scale, 1.0) / _setting(inner, family.logit_divisor, 1.0)
    softcap = None if family.softcap is None else _setting(inner, family.softcap, 0.0)
    return ModelLens(
        family.blocks,
        tuple(range(len(blocks))),
        family.norm,
        find_decoder(inner, run, family.blocks, called.returned),
        NormFit(family.norm_kind, getattr(norm, names[0]), family.norm_offset),
        MapFit(scale, softcap, run.logits.shape[-1]),
    )


def _setting(model: PreTrainedModel, name: str | None, default: float) -> float:
    if name is None:
        return default
    config = model.config.get_text_config()
    if not hasattr(config, name):
        raise ValueError(
            f"the config of {class_name(model)} has no entry {name!r}, as its Family says: correct"
            " the Family and call register_family again"
        )
    value: float = getattr(config, name)
    return value


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks of the model that run, in their order."""
    return detect_lens(model).blocks_in(causal_lm_of(model))


def final_norm_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the norm between the last block and the head, or None if there is none."""
    return detect_lens(model).norm_in(causal_lm_of(model))


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of the model that returns the normed final hidden state."""
    return detect_lens(model).decoder_in(causal_lm_of(model))


def lens_head_from(model: PreTrainedModel) -> LensHead:
    """Return the lens head of a Hugging Face causal language model; it shares the parameters.

    ``model`` may be a peft model.

    Raises:
        ValueError: The model has no lens; the message says why.
        TypeError: The head or the final norm is quantised, sharded or wrapped by an adapter.
    """
    return detect_lens(model).head_in(causal_lm_of(model))
