"""Contexts that run a model in evaluation mode or without autocast, and restore its state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Set evaluation mode inside the context, and restore the mode of every module on exit.

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
    """Return a context that computes in the dtypes of weights and inputs."""
    return torch.autocast(device.type, None, False)
