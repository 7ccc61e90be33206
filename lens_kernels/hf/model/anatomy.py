"""Finds the blocks, decoder and lens head of a model, and remembers them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lens_kernels.hf.model.detection import find_decoder, find_lens
from lens_kernels.hf.model.families import REGISTERED, Family, causal_lm_of, class_name
from lens_kernels.hf.model.parts import ModelLens, NormFit
from lens_kernels.hf.model.state import measured
from lens_kernels.hf.model.tracing import Trace, settings_of, trace
from lens_kernels.hf.model.verification import check_lens
from lens_kernels.lens import LensHead

# Maps each model to its lens, and to the numbers and modules on which the lens depends.
_FOUND: WeakKeyDictionary[nn.Module, tuple[list[object], ModelLens]] = WeakKeyDictionary()


def detect_lens(model: Any) -> ModelLens:
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
    return _checked(inner, None) if known is None else known


def verify_lens(model: Any) -> None:
    """Compare a model's lens with the model's own logits, even if they were compared before.

    Raises:
        ValueError: The lens's logits differ from the model's, or its norm from the model's norm.
    """
    inner = causal_lm_of(model)
    _checked(inner, _remembered(inner))


def _checked(inner: Any, known: ModelLens | None) -> ModelLens:
    """Return a lens that was compared with the model's logits: the known one, or a detected one."""
    family = REGISTERED.get(inner.config.model_type)

    def check() -> ModelLens:
        run = trace(inner)
        found = known or (find_lens(run) if family is None else _named_lens(family, run))
        check_lens(found, run)
        return found

    found = measured(inner, check)
    _FOUND[inner] = _depends_on(inner, found), found
    return found


def _remembered(inner: Any) -> ModelLens | None:
    parts, found = _FOUND.get(inner, ([], None))
    try:
        return found if found and parts == _depends_on(inner, found) else None
    except AttributeError:  # the model no longer has a part of the lens
        return None


def _depends_on(inner: Any, lens: ModelLens) -> list[object]:
    """Return the modules and numbers that a lens depends on. Modules are compared by identity."""
    norm = lens.norm_in(inner)
    return [
        REGISTERED.get(inner.config.model_type),
        inner.get_output_embeddings(),
        norm,
        *inner.get_submodule(lens.blocks).children(),
        *(x for x in (() if norm is None else vars(norm).values()) if type(x) is float),
        *(
            (name, x)
            for name, x in settings_of(inner).items()
            if type(x) in (int, float) and "token" not in name
        ),
    ]


def _named_lens(family: Family, run: Trace) -> ModelLens:
    config = run.model.config.get_text_config()

    def entry(name: str | None, default: Any) -> Any:
        return default if name is None else getattr(config, name)

    try:
        blocks, norm = map(run.model.get_submodule, (family.blocks, family.norm))
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        scale = entry(family.logit_scale, 1.0) / entry(family.logit_divisor, 1.0)
        softcap = entry(family.softcap, None)
    except AttributeError as error:
        raise ValueError(
            f"{class_name(run.model)} does not fit its {family}: {error}. Correct the Family and"
            " call register_family again, or pass a causal language model with its head"
        ) from error
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(
            f"{family.blocks!r} of {class_name(run.model)} must be the nn.ModuleList of its blocks,"
            f" got {type(blocks).__name__}: correct its Family.blocks"
        )
    called = run.last(norm)
    if called is None or called.returned is None:
        raise ValueError(
            f"{class_name(run.model)} does not call {family.norm!r}, which its Family.norm names"
        )
    decoder = find_decoder(run, family.blocks, called.returned)
    fit = NormFit(family.norm_kind, eps, family.norm_offset)
    ran, vocab_size = tuple(range(len(blocks))), run.logits.shape[-1]
    return ModelLens(family.blocks, ran, family.norm, decoder, fit, 1.0, scale, softcap, vocab_size)


def blocks_of(model: Any) -> list[nn.Module]:
    """Return the blocks of the model that run, in their order."""
    return detect_lens(model).blocks_in(model)


def final_norm_of(model: Any) -> nn.Module | None:
    """Return the norm between the last block and the head, or None if there is none."""
    return detect_lens(model).norm_in(model)


def lens_head_from(model: Any) -> LensHead:
    """Return the lens head of a Hugging Face causal language model; it shares the parameters.

    ``model`` may be a peft model.

    Raises:
        ValueError: The model has no lens; the message says why.
        TypeError: The head or the final norm is quantised, sharded or wrapped by an adapter.
    """
    return detect_lens(model).head_in(model)
