"""Pointwise code, compiled by TorchInductor if the machine has a C++ compiler."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lens_kernels import compat

INDUCTOR: dict[str, Any] = {
    # Recompute cheap values from the two tiles instead of storing them. By default Inductor stores
    # four more blocks instead of one, and the pass takes 1.6 times as long (2 cores).
    "realize_opcount_threshold": 1 << 30,
    "realize_reads_threshold": 1 << 30,
    # Fused multiply-add instructions save 10 % of the pass on a CPU.
    "cpp.enable_floating_point_contract_flag": "fast",
}
# On a GPU Inductor's thresholds fit, but it splits reductions of up to 512 rows, and an unknown
# vocabulary size costs a division an element: only the number of rows may vary.
INDUCTOR_GPU: dict[str, Any] = {"split_reductions": False}
# Variants of a function that a process compiles: divergences, with gradient or without, bias, cap,
# a single row. Past torch's own limit of 8 it would run eagerly.
VARIANTS = 64

_compiler_failed = False


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, options=INDUCTOR)


@functools.cache
def _compile_for_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=False, options=INDUCTOR_GPU)

    def with_any_rows(rows: Tensor, *args: Any) -> Any:
        for x in compat.tensors_in((rows, args)):
            if x.dim() and x.shape[0] == rows.shape[0]:
                compat.vary_first_size(x)
        return compiled(rows, *args)

    return with_any_rows


def call(compiled: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function``: compiled if requested and if the machine can, else eagerly.

    Its first argument has a row for each row of the others.
    """
    global _compiler_failed
    if compiled and not _compiler_failed:
        try:
            with compat.recompile_limit(VARIANTS):
                compile = _compile if args[0].device.type == "cpu" else _compile_for_gpu
                return compile(function)(*args)
        except compat.compiler_errors() as error:
            _compiler_failed = True
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"the pointwise pass runs uncompiled, which is slower: {reason}", stacklevel=2
            )
    return function(*args)
