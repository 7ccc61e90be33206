"""Contexts that change how a model runs, and restore its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Return a context with the model in evaluation mode. Each module's mode is restored on exit.

    A submodule may have another mode than the model. Frozen submodules often stay in evaluation
    mode.
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context without autocast, which computes in the dtypes of weights and inputs."""
    return torch.autocast(device.type, None, False)


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace ``module.forward`` by ``forward`` inside the context.

    Data-parallel wrappers prepare gradients and gather parameters when the module is called. So
    code that uses the parameters must run inside that call.
    """
    # accelerate sets its own forward on the instance for autocast. It must be restored.
    before = vars(module).get("forward")
    try:
        module.forward = forward
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before


def measured(model: Any, work: Callable[[], T]) -> T:
    """Run ``work`` on a model and return the result. Afterwards the model is as it was before.

    The model is in evaluation mode, without gradients. Autocast around the call has no effect, and
    the random state is unchanged. A model with weights of several dtypes may need autocast. It runs
    without autocast first, and with it if that fails.
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
def _measuring(model: Any, autocast: bool) -> Iterator[None]:
    devices = {parameter.device for parameter in model.parameters()}
    with ExitStack() as contexts:
        contexts.enter_context(torch.random.fork_rng([]))
        for kind in {device.type for device in devices} - {"meta"}:
            contexts.enter_context(torch.autocast(kind, torch.bfloat16, enabled=autocast))
            if kind != "cpu":
                indices = sorted(device.index or 0 for device in devices if device.type == kind)
                contexts.enter_context(torch.random.fork_rng(indices, device_type=kind))
        contexts.enter_context(evaluating(model))
        contexts.enter_context(torch.no_grad())
        yield
