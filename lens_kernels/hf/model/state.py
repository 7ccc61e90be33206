"""Contexts that change how a model runs, and restore its state afterwards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

T = TypeVar("T")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Set evaluation mode inside the context, and restore each module's mode on exit.

    A submodule may have another mode than the model: frozen submodules often stay in evaluation
    mode.
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Let ``model.generate`` use only the settings of ``config`` inside the context.

    If ``generate`` got them as an argument, it would add the model's saved settings, such as a
    repetition penalty.
    """
    holder = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = holder.generation_config
    try:
        holder.generation_config = config
        yield
    finally:
        holder.generation_config = kept


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context without autocast: operations keep the dtypes of weights and inputs."""
    return torch.autocast(device.type, None, False)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Replace ``module.forward`` by ``forward`` inside the context.

    Data-parallel wrappers prepare gradients and gather parameters when the module is called. So
    code that uses the parameters must run inside a call of the module.
    """
    # accelerate sets a forward on the module for autocast, which must be restored afterwards.
    before = vars(module).get("forward")
    try:
        module.forward = forward
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before


@contextmanager
def gathered(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Gather parameters inside the context, if DeepSpeed ZeRO-3 partitions them.

    All ranks must enter the context with the same parameters. Outside it, a partitioned parameter
    is an empty tensor. The context yields whether it gathers any.
    """
    # DeepSpeed refuses to gather a parameter twice.
    held = [x for x in tensors if x.numel() != getattr(x, "ds_numel", x.numel())]
    if not held:
        yield False
        return
    with importlib.import_module("deepspeed").zero.GatheredParameters(held):
        yield True


def whole_state(model: PreTrainedModel, keep: bool) -> dict[str, Tensor]:
    """Return a model's state dict on the CPU, with the parameters that ZeRO-3 partitions.

    All ranks must call this function. Ranks without ``keep`` get an empty dict.
    """
    copies: dict[int, Tensor] = {}  # tied weights have one copy
    named = model.state_dict(keep_vars=True)
    for x in named.values():
        with gathered([x]):
            if keep:
                copies[id(x)] = x.detach().to("cpu", copy=True)
    return {name: copies[id(x)] for name, x in named.items() if keep}


def measured(model: PreTrainedModel, work: Callable[[], T]) -> T:
    """Run ``work`` on a model, return the result, and restore the state of the model.

    The model runs in evaluation mode and without gradients. Autocast of the caller has no effect,
    and the random state is unchanged. If the model fails without autocast, as models with weights
    of several dtypes may, it runs again with autocast.
    """
    try:
        with _measuring(model, autocast=False):
            return work()
    except RuntimeError:
        dtypes = {x.dtype for x in model.parameters() if x.is_floating_point()}
        if len(dtypes) < 2:
            raise
    with _measuring(model, autocast=True):
        return work()


@contextmanager
def _measuring(model: PreTrainedModel, autocast: bool) -> Iterator[None]:
    devices = {parameter.device for parameter in model.parameters()}
    with ExitStack() as contexts:
        for kind in {device.type for device in devices} - {"meta"}:
            contexts.enter_context(torch.autocast(kind, torch.bfloat16, enabled=autocast))
            indices = {device.index or 0 for device in devices if device.type == kind != "cpu"}
            contexts.enter_context(torch.random.fork_rng(indices, device_type=kind))
        contexts.enter_context(evaluating(model))
        contexts.enter_context(torch.no_grad())
        yield
