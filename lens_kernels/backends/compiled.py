"""Pointwise code, compiled by TorchInductor where that pays and the machine can."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from lens_kernels import compat

INDUCTOR: dict[str, Any] = {
    # Recompute what is cheap from the two tiles rather than store it: by default Inductor keeps
    # four more blocks instead of one, and the pass takes 1.6 times as long (2 cores).
    "realize_opcount_threshold": 1 << 30,
    "realize_reads_threshold": 1 << 30,
    # A CPU multiplies and adds in one step, without rounding in between: 10 % of the pass.
    "cpp.enable_floating_point_contract_flag": "fast",
}
# Variants of a function that a process compiles: divergences, with gradient or without, bias, cap,
# a single row. Past torch's own limit of 8 it would run eagerly.
VARIANTS = 64

_compiler_failed = False


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, options=INDUCTOR)


def call(compiled: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function``: compiled if requested and if the machine can, else eagerly."""
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
