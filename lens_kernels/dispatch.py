"""The backends by name, and the choice among them, made for each call from its tensors."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lens_kernels import compat


@dataclass(frozen=True)
class Backend:
    """A way to evaluate a call.

    ``module`` offers ``evaluate(call) -> Evaluation``; or, where ``differentiable``,
    ``rows(call) -> Tensor``, through which autograd differentiates. ``objection(device, fp64)``
    says why the backend cannot serve such tensors, or returns None;
    ``reservation(device, operand)`` why ``"auto"`` does not take it, though it can, for operands of
    a dtype or, if None, of any.
    """

    name: str
    module: str
    objection: Callable[[torch.device, bool], str | None]
    differentiable: bool = False
    reservation: Callable[[torch.device, torch.dtype | None], str | None] = lambda *args: None

    def load(self) -> Any:
        """Import and return the backend's module."""
        return importlib.import_module(self.module)


@compat.constant_in_graphs
def _triton_objection(device: torch.device, fp64: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if fp64:
        return "its kernels compute in float32, and the head is float64"
    if device.type == "cuda":
        return None
    if device.type == "cpu":
        from lens_kernels.backends.triton.interpreter import INTERPRETING

        if INTERPRETING:
            return None
        return (
            "Triton compiles for GPUs alone. To run its kernels in Triton's interpreter, which is"
            " for tests and slow, set TRITON_INTERPRET=1 before Python starts"
        )
    return "its kernels are for NVIDIA and AMD GPUs"


@compat.constant_in_graphs
def _triton_reservation(device: torch.device, operand: torch.dtype | None) -> str | None:
    by_name = "only if asked for by name"
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return by_name
    try:
        from lens_kernels.backends.triton.tiles import store

        # Unasked, kernels are not run that this kind of GPU has not been seen to run right.
        complete = store.is_tuned(operand, device)
    except (ImportError, OSError, RuntimeError) as error:  # of Triton, or where there is no home
        return f"{by_name}: {error}"
    return None if complete else f"{by_name}, or once `lens-kernels tune` has run here"


def _reference_objection(device: torch.device, fp64: bool) -> str | None:
    if device.type == "mps":
        return "it computes in float64, which MPS does not have"
    if importlib.util.find_spec("reference") is None:
        return "the reference/ folder is not importable: run from the root of a source checkout"
    return None


REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("torch", "lens_kernels.backends.torch_chunked", lambda device, fp64: None),
        Backend(
            "triton",
            "lens_kernels.backends.triton",
            _triton_objection,
            reservation=_triton_reservation,
        ),
        Backend(
            "reference",
            "lens_kernels.backends.dense",
            _reference_objection,
            differentiable=True,
            reservation=lambda *args: "only if asked for by name",
        ),
    )
}


def automatic(
    device: torch.device, fp64: bool = False, operand: torch.dtype | None = None
) -> list[Backend]:
    """Return the backends from which ``"auto"`` takes one for such tensors."""
    unasked = [b for b in REGISTRY.values() if b.reservation(device, operand) is None]
    return [b for b in unasked if b.objection(device, fp64) is None]


def choose(
    name: str,
    device: torch.device,
    fp64: bool = False,
    operand: torch.dtype | None = None,
    cost: Callable[[str], float] | None = None,
) -> Backend:
    """Return the backend called ``name``, or for ``"auto"`` one that can serve the tensors.

    ``device`` is theirs, ``fp64`` says whether a head is in float64, and ``operand`` is the dtype
    of the products' factors. Of several the one of the least ``cost(name)`` is taken, or the first.
    """
    if name == "auto":
        able = automatic(device, fp64, operand)
        if cost is None or len(able) == 1:
            return able[0]
        costs = [cost(backend.name) for backend in able]
        return able[costs.index(min(costs))]
    if name not in REGISTRY:
        known = ", ".join(repr(n) for n in ("auto", *REGISTRY))
        raise ValueError(f"backend={name!r} is unknown; choose one of {known}")
    backend = REGISTRY[name]
    reason = backend.objection(device, fp64)
    if reason is not None:
        raise RuntimeError(
            f"backend={name!r} cannot serve tensors on {device.type}: {reason};"
            " or use backend='torch'"
        )
    return backend
