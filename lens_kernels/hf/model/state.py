"""Run a model for measurement, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Set evaluation mode inside the context; restore the mode of every module on exit.

    Submodules may be in another mode than the model: frozen ones often stay in evaluation mode.
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
