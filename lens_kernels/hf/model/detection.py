"""Finds the lens of a model in a recorded forward pass. Names of modules do not matter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lens_kernels.hf.model.families import class_name
from lens_kernels.hf.model.fitting import EXACT, difference, exact_number, factor, fit_map, fit_norm
from lens_kernels.hf.model.parts import ModelLens
from lens_kernels.hf.model.tracing import Call, Trace, settings_of, states_of

ROUNDED = 1e-2  # the largest relative difference between equal states in 16 bits


def find_lens(run: Trace) -> ModelLens:
    """Return the lens between the last block and the logits of a model that ran once.

    The model must call its head once. The norm is the module whose output, perhaps times a
    constant, is the head's input. The blocks are the module list whose last block returned the
    norm's input.

    Raises:
        ValueError: There is no such lens; the message says what the model does instead.
        TypeError: Head or norm are quantised, sharded or wrapped by an adapter.
    """
    try:
        return _found(run)
    except ValueError as error:
        raise ValueError(
            f"{class_name(run.model)} has no lens: {error}. If the logits are a head of a norm of a"
            " block's output all the same, name the parts: lens_kernels.hf.register_family("
            f"{run.model.config.model_type!r}, Family(...)); or build a LensHead by hand, and call"
            " symmetric_lens_loss or distillation_loss"
        ) from error


def _found(run: Trace) -> ModelLens:
    fed = [call.given for call in run.calls if call.module is run.head]
    if len(fed) != 1 or fed[0] is None:
        raise ValueError(f"the model calls its head {len(fed)} times in a forward pass, not once")
    x = fed[0]
    if x.shape[:-1] != run.ids.shape:
        raise ValueError(
            f"its head reads states of shape {tuple(x.shape)} for tokens of shape"
            f" {tuple(run.ids.shape)}, so the logits are not those of the tokens"
        )
    for norm, h, normed, multiple in _norms(run, x):
        blocks = _blocks_before(run, h)
        if blocks is None:
            continue
        path, fit = None, None
        if norm is not None:
            # A wrapper of the norm, such as an adapter, has the same input and output.
            *_, whole = [c for c in run.calls if c.given is h and _same(c.returned, normed)]
            path, fit = norm.path, fit_norm(whole.module, h.shape[-1], settings_of(run.model))
        if run.head.bias is not None and multiple != 1:
            raise ValueError("the model scales its final states before a head with a bias")
        decoder = find_decoder(run, blocks[0], normed)
        scale, softcap, vocab_size = fit_map(run, decoder)
        return ModelLens(*blocks, path, decoder, fit, multiple, scale, softcap, vocab_size)
    raise ValueError(_obstacle(run, x))


def _norms(run: Trace, x: Tensor) -> Iterator[tuple[Call | None, Tensor, Tensor, float]]:
    """Yield the calls that may be the final norm, with input, output, and multiple at the head.

    The first one is None, for a model without a final norm.
    """
    yield None, x, x, 1.0
    tolerance = EXACT if run.exact else ROUNDED
    for call in reversed(run.calls):
        module, h, normed = call.module, call.given, call.returned
        step = not any(True for _ in module.children())
        step = step or nn.utils.parametrize.is_parametrized(module)
        if not step or module is run.head or h is None or normed is None:
            continue
        if h.shape == normed.shape == x.shape:
            multiple = 1.0 if _same(normed, x) else factor(x, normed)
            if _same(multiple * normed.double(), x, tolerance):
                multiple = exact_number(multiple, settings_of(run.model), tolerance / 5)
                yield call, h, normed, multiple


def _same(a: Tensor | None, b: Tensor, tolerance: float = 0.0) -> bool:
    """Return whether hidden states are equal apart from a cast, which some models apply."""
    return a is not None and a.shape == b.shape and difference(a.to(b), b) <= tolerance


def _blocks_before(run: Trace, h: Tensor) -> tuple[str, tuple[int, ...]] | None:
    """Return path and block indices of the longest module list whose last block returned ``h``."""
    ended = {id(call.module): i for i, call in enumerate(run.calls)}
    found = []
    for path, blocks in run.model.named_modules():
        if isinstance(blocks, nn.ModuleList):
            ran = {i: ended[id(block)] for i, block in enumerate(blocks) if id(block) in ended}
            order = list(ran.values())
            if order and order == sorted(order) and _same(run.calls[order[-1]].returned, h):
                found.append((-len(ran), path.count("."), path, ran))
    if not found:
        return None
    *_, path, ran = min(found)
    for i, position in ran.items():
        states = run.calls[position].returned
        if states is None or states.shape != h.shape:
            shape = None if states is None else tuple(states.shape)
            raise ValueError(
                f"block {i} in {path!r} returns states of shape {shape}, and the last one of shape"
                f" {tuple(h.shape)}"
            )
    return path, tuple(ran)


def find_decoder(run: Trace, blocks: str, normed: Tensor) -> str:
    """Return the path of the outermost module that returns ``normed`` from tokens alone."""
    names = blocks.split(".")
    for path in (".".join(names[:i]) for i in range(1, len(names))):
        part = run.model.get_submodule(path)
        called = run.last(part)
        if called is None or not _same(called.returned, normed, ROUNDED):
            continue
        try:  # modules that need other inputs may raise errors of any class
            with torch.autocast(run.ids.device.type, run.autocast, enabled=bool(run.autocast)):
                alone = states_of(part, {"input_ids": run.ids})
        except Exception:
            continue
        if _same(alone, normed, ROUNDED):
            return path
    raise ValueError(
        f"no part around {blocks!r} returns the normed final states if it is called with tokens"
    )


def _obstacle(run: Trace, x: Tensor) -> str:
    """Return a text that describes the module between blocks and head that prevents a lens."""
    for path, blocks in run.model.named_modules():
        listed = isinstance(blocks, nn.ModuleList) and len(blocks) > 1
        last = run.last(blocks[-1]) if listed else None
        states = None if last is None else last.returned
        if states is not None and states.dim() > x.dim() and states.shape[-1] == x.shape[-1]:
            return (
                f"the blocks in {path!r} return {states.dim()}-dimensional states of shape"
                f" {tuple(states.shape)}, several streams that are merged before the head"
                " (hyper-connections or AltUp)"
            )

    def source(x: Tensor, norm: Call | None = None) -> Call | None:  # the innermost one
        return next((c for c in run.calls if c is not norm and _same(c.returned, x)), None)

    for norm, h, *_ in _norms(run, x):
        if norm is None:
            continue
        before = source(h, norm)
        if before is None:
            return f"the head gets the output of {norm}, whose input no block returns"
        return (
            f"the head gets the output of {norm}, whose input is not the last block's output but"
            f" that of {before}: a transform before the head"
        )
    last = source(x)
    if last is None:
        return "the head's input is not the output of a norm, a block or any other module"
    return f"the head gets the output of {last}: a transform before the head, not a norm"
