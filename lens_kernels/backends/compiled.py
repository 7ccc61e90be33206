"""Pointwise code, compiled by TorchInductor if the machine has a C++ compiler."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from lens_kernels import compat

INDUCTOR: dict[str, Any] = {
    # Recompute cheap values from the two tiles instead of storing them. By default Inductor stores
    # four more blocks instead of one, and the pass takes 1.6 times as long (2 cores).
    "realize_opcount_threshold": 1 << 30,
    "realize_reads_threshold": 1 << 30,
    # Fused multiply-add instructions save 10 % of the pass on a CPU.
    "cpp.enable_floating_point_contract_flag": "fast",
}
# Compiled variants of a function: divergences, with or without gradient, bias and cap, and for a
# single row. Beyond torch's default limit of 8 the function would run eagerly.
VARIANTS = 64

_compiler_failed = False


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, options=INDUCTOR)


def call(compiled: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function``, compiled if requested and possible, else eagerly."""
    global _compiler_failed
    if compiled and not _compiler_failed:
        try:
            with compat.recompile_limit(VARIANTS):
                return _compile(function)(*args)
        except compat.compiler_errors() as error:
            _compiler_failed = True
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"the pointwise pass runs uncompiled, which is slower: {reason}", stacklevel=2
            )
    return function(*args)
