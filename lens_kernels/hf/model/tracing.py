"""Records the inputs and outputs of all modules of a model, for a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# the number of tokens in a trace: 5, because 5 is rarely the size of anything else in a model
LENGTH = 5


@dataclass(frozen=True)
class Call:
    """A call of a module: its path and output, and hidden states in its input and output."""

    path: str
    module: nn.Module
    given: Tensor | None
    returned: Tensor | None
    output: object


@dataclass(frozen=True)
class Trace:
    """The calls of modules in a forward pass, ordered by their end, and the model's logits.

    ``autocast`` is the dtype of autocast during the pass, or None without autocast.
    """

    ids: Tensor
    calls: list[Call]
    logits: Tensor
    autocast: torch.dtype | None

    def last(self, module: nn.Module) -> Call | None:
        """Return the last call of the module at a path."""
        return next((call for call in reversed(self.calls) if call.module is module), None)


def hidden_of(value: object) -> Tensor | None:
    """Return the hidden states from a module's result: a tensor, a sequence or a model output."""
    value = getattr(value, "last_hidden_state", value)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
        return value
    return None


def hidden_in(args: Iterable[object], kwargs: Mapping[str, object]) -> Tensor | None:
    """Return the first argument of a module that may be hidden states."""
    named = [kwargs["hidden_states"]] if "hidden_states" in kwargs else list(kwargs.values())
    return next((x for x in map(hidden_of, [*args, *named]) if x is not None), None)


def sample_tokens(model: PreTrainedModel, vocab_size: int, device: torch.device) -> Tensor:
    """Return a row of token ids.

    Token ids that occur in the config are avoided, because such a token may represent an image.
    """
    named: set[int] = set()
    for config in (model.config, model.config.get_text_config()):
        for name, value in vars(config).items():
            if "token" in name:
                items = value if isinstance(value, list) else [value]
                named.update(x for x in items if isinstance(x, int))
    usual = [i for i in range(min(vocab_size, 1000)) if i not in named] or [0]
    ids = [usual[(7 * i + 3) % len(usual)] for i in range(LENGTH)]
    return torch.tensor([ids], device=device)


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register the forward hooks that ``hooks`` yields, and remove them on exit."""
    handles: list[RemovableHandle] = []
    try:
        handles.extend(hooks)
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits from a model's result."""
    logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
    return logits


def trace(
    model: PreTrainedModel, inner: nn.Module, ids: Tensor, parts: Iterable[nn.Module] | None = None
) -> Trace:
    """Run ``model`` on tokens, and record the calls of the modules ``parts`` or of all modules.

    ``inner`` is the same model without peft's wrapper. Paths start at ``inner``.
    """
    calls: list[Call] = []
    autocast: set[torch.dtype] = set()

    def keep(path: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[object], kwargs: dict[str, object], output: object
        ) -> None:
            given, returned = hidden_in(args, kwargs), hidden_of(output)
            calls.append(Call(path, module, given, returned, output))
            # accelerate can wrap a model's forward in autocast, which no context around the call
            # disables.
            if torch.is_autocast_enabled(ids.device.type):
                autocast.add(torch.get_autocast_dtype(ids.device.type))

        return hook

    wanted = None if parts is None else {id(part) for part in parts}
    with hooked(
        module.register_forward_hook(keep(path), with_kwargs=True)
        for path, module in inner.named_modules()
        if wanted is None or id(module) in wanted
    ):
        logits = logits_of(model, ids)
    return Trace(ids, calls, logits, min(autocast, key=str, default=None))
