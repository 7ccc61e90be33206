"""Records the inputs and outputs of all modules of a model, for a few tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lens_kernels.hf.model.families import class_name
from lens_kernels.hf.model.parts import plain_head

# The number of tokens in a trace: 5, because 5 is rarely the size of anything else in a model.
LENGTH = 5


@dataclass(frozen=True)
class Call:
    """A call of a module: its path and output, and hidden states in its input and output."""

    path: str
    module: nn.Module
    given: Tensor | None
    returned: Tensor | None
    output: Any

    def __str__(self) -> str:
        """Return the path and class of the module, for error messages."""
        return f"{self.path!r}, a {type(self.module).__name__}"


@dataclass(frozen=True)
class Trace:
    """One forward pass of a model on a few tokens.

    Attributes:
        model: The causal language model. Paths start there.
        ids: The tokens, a row.
        calls: The calls of modules, in the order in which they ended.
        logits: The model's logits.
        autocast: The dtype of autocast during the pass, or None without autocast.
    """

    model: Any
    ids: Tensor
    calls: list[Call]
    logits: Tensor
    autocast: torch.dtype | None

    @property
    def head(self) -> Any:
        """The model's head."""
        return self.model.get_output_embeddings()

    @property
    def exact(self) -> bool:
        """Whether nothing was rounded to 16 bits. Models may cast 16-bit results to float32."""
        itemsize = min(self.logits.itemsize, self.head.weight.itemsize)
        return self.autocast is None and itemsize >= 4

    def last(self, module: nn.Module) -> Call | None:
        """Return the last call of a module."""
        return next((call for call in reversed(self.calls) if call.module is module), None)


def settings_of(model: Any) -> Mapping[str, Any]:
    """Return the entries of a model's text config."""
    return vars(model.config.get_text_config())


def hidden_of(value: Any) -> Tensor | None:
    """Return the hidden states from a module's result: a tensor, a sequence or a model output."""
    value = getattr(value, "last_hidden_state", value)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    states = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    return value if states else None


def hidden_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first argument of a module that may be hidden states."""
    named = [kwargs["hidden_states"]] if "hidden_states" in kwargs else list(kwargs.values())
    return next((x for x in map(hidden_of, [*args, *named]) if x is not None), None)


def states_of(decoder: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden states from a decoder's result. It does not keep keys and values."""
    return hidden_of(decoder(**inputs, use_cache=False))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Return the logits from a model's result."""
    logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
    return logits


def sample_tokens(model: Any) -> Tensor:
    """Return a row of token ids, on the device of the model's head.

    Token ids that occur in the config are avoided, because such a token may represent an image.
    """
    configs = (model.config, model.config.get_text_config())
    entries = [x for config in configs for name, x in vars(config).items() if "token" in name]
    named = {i for x in entries for i in (x if isinstance(x, list) else [x]) if type(i) is int}
    weight = model.get_output_embeddings().weight
    usual = [i for i in range(min(len(weight), 1000)) if i not in named] or [0]
    ids = [usual[(7 * i + 3) % len(usual)] for i in range(LENGTH)]
    return torch.tensor([ids], device=weight.device)


@contextmanager
def hooked(hooks: Iterable[Any]) -> Iterator[None]:
    """Register the forward hooks that ``hooks`` yields, and remove them on exit."""
    handles: list[Any] = []
    try:
        handles.extend(hooks)
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(model: Any) -> Trace:
    """Run a model on a few tokens of its own vocabulary, and record the calls of all modules.

    Raises:
        ValueError: Weights are on the meta device.
        TypeError: The head is quantised, sharded or wrapped by an adapter.
    """
    # accelerate loads offloaded weights when they are needed
    offloaded = getattr(model, "hf_device_map", None) is not None
    if not offloaded and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{class_name(model)} has weights on the meta device, which hold no numbers: load it"
            " on a device"
        )
    plain_head(model)
    ids, calls, autocast = sample_tokens(model), list[Call](), set[torch.dtype]()

    def keep(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call(path, module, hidden_in(args, kwargs), hidden_of(output), output))
        # accelerate can wrap a model's forward in autocast, which no context around the call
        # disables.
        if torch.is_autocast_enabled(ids.device.type):
            autocast.add(torch.get_autocast_dtype(ids.device.type))

    with hooked(
        module.register_forward_hook(partial(keep, path), with_kwargs=True)
        for path, module in model.named_modules()
    ):
        logits = logits_of(model, ids)
    return Trace(model, ids, calls, logits, min(autocast, key=str, default=None))
