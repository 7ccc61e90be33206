"""The backends by name, and the choice among them, made for each call from its device."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Backend:
    """A way to evaluate a call.

    ``module`` offers ``evaluate(call) -> Evaluation``; or, where ``differentiable``,
    ``rows(call) -> Tensor``, through which autograd differentiates. ``objection(device)`` says why
    the backend cannot serve tensors on that device, or returns None.
    """

    name: str
    module: str
    objection: Callable[[torch.device], str | None]
    differentiable: bool = False
    automatic: bool = True

    def load(self) -> Any:
        """Import and return the backend's module."""
        return importlib.import_module(self.module)


def _reference_objection(device: torch.device) -> str | None:
    if device.type == "mps":
        return "it computes in float64, which MPS does not have"
    if importlib.util.find_spec("reference") is None:
        return "the reference/ folder is not importable: run from the root of a source checkout"
    return None


REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("torch", "lens_kernels.backends.torch_chunked", lambda device: None),
        Backend(
            "reference",
            "lens_kernels.backends.dense",
            _reference_objection,
            differentiable=True,
            automatic=False,
        ),
    )
}


def choose(name: str, device: torch.device) -> Backend:
    """Return the backend called ``name``, or for ``"auto"`` the first that can serve ``device``."""
    if name == "auto":
        return next(b for b in REGISTRY.values() if b.automatic and b.objection(device) is None)
    if name not in REGISTRY:
        known = ", ".join(repr(n) for n in ("auto", *REGISTRY))
        raise ValueError(f"backend={name!r} is unknown; choose one of {known}")
    backend = REGISTRY[name]
    reason = backend.objection(device)
    if reason is not None:
        raise RuntimeError(
            f"backend={name!r} cannot serve tensors on {device.type}: {reason};"
            " or use backend='auto'"
        )
    return backend
