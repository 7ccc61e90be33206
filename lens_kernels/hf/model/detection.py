"""Finds the lens of a model by running it on a few tokens. Names of modules do not matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lens_kernels.hf.model.families import class_name
from lens_kernels.hf.model.fitting import (
    EXACT,
    difference,
    exact_number,
    factor,
    fit_map,
    fit_norm,
    settings_of,
)
from lens_kernels.hf.model.parts import ModelLens, plain_head, plain_norm
from lens_kernels.hf.model.tracing import Call, Trace, hidden_of, sample_tokens, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDED = 1e-2  # the largest relative difference between equal states in 16 bits


def traced(
    model: PreTrainedModel, inner: PreTrainedModel, parts: Iterable[nn.Module] | None = None
) -> Trace:
    """Run a model on a few tokens of its own vocabulary, without peft's wrapper in the paths.

    Raises:
        ValueError: Weights are on the meta device.
        TypeError: The head is quantised, sharded or wrapped by an adapter.
    """
    # accelerate loads offloaded weights when they are needed
    offloaded = getattr(inner, "hf_device_map", None) is not None
    if not offloaded and any(parameter.is_meta for parameter in inner.parameters()):
        raise ValueError(
            f"{class_name(model)} has weights on the meta device, which hold no numbers: load it"
            " on a device"
        )
    weight = plain_head(inner).weight
    return trace(model, inner, sample_tokens(inner, len(weight), weight.device), parts)


def find_lens(model: PreTrainedModel, inner: PreTrainedModel, run: Trace) -> ModelLens:
    """Return the lens between the last block and the logits of a model that ran once.

    The model must call its head once. The norm is the module whose output, perhaps times a
    constant, is the head's input. The blocks are the module list whose last block returned the
    norm's input.

    Raises:
        ValueError: There is no such lens; the message says what the model does instead.
        TypeError: Head or norm are quantised, sharded or wrapped by an adapter.
    """
    try:
        return _found(model, inner, run)
    except ValueError as error:
        raise ValueError(f"{class_name(model)} has no lens: {error}. {_advice(inner)}") from error


def _found(model: PreTrainedModel, inner: PreTrainedModel, run: Trace) -> ModelLens:
    head, settings = plain_head(inner), settings_of(inner)
    fed = [call for call in run.calls if call.module is head]
    if len(fed) != 1 or fed[0].given is None:
        raise ValueError(f"the model calls its head {len(fed)} times in a forward pass, not once")
    x = fed[0].given
    if x.shape[:-1] != run.ids.shape:
        raise ValueError(
            f"its head reads states of shape {tuple(x.shape)} for tokens of shape"
            f" {tuple(run.ids.shape)}, so the logits are not those of the tokens"
        )
    for call, measured in _norms(run, head, x):
        h = x if call is None else call.given
        assert h is not None
        found = _blocks_before(run, inner, h)
        if found is None or not (call is None or _is_norm(run, call)):
            continue
        blocks, indices = found
        path, fit, normed = None, None, x
        if call is not None and call.returned is not None:
            plain_norm(call.module)
            fit = fit_norm(call.module, h.shape[-1], settings)
            path, normed = call.path, call.returned
        multiple = exact_number(measured, settings, tolerance_of(run, head.weight) / 5)
        if head.bias is not None and multiple != 1:
            raise ValueError("the model scales its final states before a head with a bias")
        decoder = find_decoder(inner, run, blocks, normed)
        logits = fit_map(model, inner, run, decoder)
        return ModelLens(blocks, indices, path, decoder, fit, logits, multiple)
    raise ValueError(_obstacle(run, inner, head, x))


def tolerance_of(run: Trace, weight: Tensor) -> float:
    """Return the relative rounding error that is allowed for a model's states."""
    # A model may return float32 logits but compute them in 16 bits.
    rounded = run.autocast is not None or weight.dtype.itemsize < 4
    return ROUNDED if rounded else EXACT


def _norms(run: Trace, head: nn.Linear, x: Tensor) -> Iterator[tuple[Call | None, float]]:
    yield None, 1.0
    # in reversed order, a wrapper comes before the module inside it
    for call in reversed(run.calls):
        if call.module is head or call.given is None or call.returned is None:
            continue
        if call.given.shape == call.returned.shape == x.shape:
            same = _same(call.returned, x)
            multiple = 1.0 if same else factor(x, call.returned)
            if same or difference(multiple * call.returned.double(), x) <= tolerance_of(
                run, head.weight
            ):
                yield call, multiple


def _is_norm(run: Trace, call: Call) -> bool:
    """Return whether a module computes a single step, as norms do. It may be inside wrappers."""
    inside = [part for part in run.calls if part.path.startswith(f"{call.path}.")]
    whole = any(part.given is call.given and _same(part.returned, call.returned) for part in inside)
    plain = not any(True for _ in call.module.children())
    return plain or whole or nn.utils.parametrize.is_parametrized(call.module)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether hidden states are equal apart from a cast, which some models apply."""
    if a is None or b is None or a.shape != b.shape:
        return False
    return torch.equal(a.to(b), b)


def _blocks_before(
    run: Trace, inner: PreTrainedModel, h: Tensor
) -> tuple[str, tuple[int, ...]] | None:
    ended = {id(call.module): i for i, call in enumerate(run.calls)}
    found = []
    for path, blocks in inner.named_modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        indices = [i for i, block in enumerate(blocks) if id(block) in ended]
        order = [ended[id(blocks[i])] for i in indices]
        if not indices or not _same(run.calls[order[-1]].returned, h) or order != sorted(order):
            continue
        found.append((-len(indices), path.count("."), path, tuple(indices), order))
    if not found:
        return None
    *_, path, ran, order = min(found)
    for i, position in zip(ran, order, strict=True):
        states = run.calls[position].returned
        if states is None or states.shape != h.shape:
            shape = None if states is None else tuple(states.shape)
            raise ValueError(
                f"block {i} in {path!r} returns states of shape {shape}, and the last one of shape"
                f" {tuple(h.shape)}"
            )
    return path, ran


def find_decoder(inner: PreTrainedModel, run: Trace, blocks: str, normed: Tensor) -> str:
    """Return the path of the outermost module that returns ``normed`` from tokens alone.

    Raises:
        ValueError: There is no such module.
    """
    path, paths = blocks, list[str]()
    while "." in path:
        path = path.rpartition(".")[0]
        paths.insert(0, path)
    for path in paths:
        part = inner.get_submodule(path)
        called = run.last(part)
        if called is None or not _close(called.returned, normed):
            continue
        try:  # modules that need other inputs may raise errors of any class
            with torch.autocast(run.ids.device.type, run.autocast, enabled=bool(run.autocast)):
                alone = hidden_of(decode(part, {"input_ids": run.ids}))
        except Exception:
            continue
        if _close(alone, normed):
            return path
    raise ValueError(
        f"no part around {blocks!r} returns the normed final states if it is called with tokens"
    )


def decode(decoder: nn.Module, inputs: Mapping[str, object]) -> object:
    """Run a decoder without storing keys and values."""
    return decoder(**inputs, use_cache=False)


def _close(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and difference(a, b) <= ROUNDED


def _obstacle(run: Trace, inner: PreTrainedModel, head: nn.Linear, x: Tensor) -> str:
    """Return a text that describes the module between blocks and head that prevents a lens."""
    streams = _streams(run, inner, x)
    if streams is not None:
        return streams
    for call, _ in _norms(run, head, x):
        if call is None or call.given is None or any(True for _ in call.module.children()):
            continue
        kind = f"{call.path!r}, a {type(call.module).__name__}"
        source = _source(run, call.given, before=call)
        if source is None:
            return f"the head gets the output of {kind}, whose input no block returns"
        return (
            f"the head gets the output of {kind}, whose input is not the last block's output but"
            f" that of {source.path!r}, a {type(source.module).__name__}: a transform before the"
            " head"
        )
    source = _source(run, x)
    if source is not None:
        return (
            f"the head gets the output of {source.path!r}, a {type(source.module).__name__}: a"
            " transform before the head, not a norm"
        )
    return "the head's input is not the output of a norm, a block or any other module"


def _source(run: Trace, x: Tensor, before: Call | None = None) -> Call | None:
    return next((c for c in run.calls if c is not before and _same(c.returned, x)), None)


def _streams(run: Trace, inner: PreTrainedModel, x: Tensor) -> str | None:
    """Return a text if the blocks pass on several streams of the head's hidden size, else None."""
    for path, blocks in inner.named_modules():
        if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
            continue
        last = run.last(blocks[-1])
        states = None if last is None else last.returned
        if states is not None and states.dim() > x.dim() and states.shape[-1] == x.shape[-1]:
            return (
                f"the blocks in {path!r} return {states.dim()}-dimensional states of shape"
                f" {tuple(states.shape)}, several streams that are merged before the head"
                " (hyper-connections or AltUp)"
            )
    return None


def _advice(inner: PreTrainedModel) -> str:
    return (
        "If the logits are a head of a norm of a block's output all the same, name the parts:"
        f" lens_kernels.hf.register_family({inner.config.model_type!r}, Family(...)); or build a"
        " LensHead by hand, and call symmetric_lens_loss or distillation_loss"
    )
