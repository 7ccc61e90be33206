"""Calls pointwise functions, compiled by TorchInductor if the machine has a compiler."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lens_kernels import compat

INDUCTOR: dict[str, Any] = {
    # Make Inductor compute cheap values twice instead of storing them. Without these settings, the
    # pointwise pass takes 1.6 times as long (2 cores).
    "realize_opcount_threshold": 1 << 30,
    "realize_reads_threshold": 1 << 30,
    # Fused multiply-add instructions save 10 % of the pointwise pass's time on a CPU.
    "cpp.enable_floating_point_contract_flag": "fast",
}
# On a GPU, keep the defaults of Inductor but one: it would split reductions of up to 512 rows.
INDUCTOR_GPU: dict[str, Any] = {"split_reductions": False}
# The maximum number of compiled variants of a function. A variant depends on the divergence and on
# which tensors there are. By default, torch compiles 8 variants and runs any other uncompiled.
VARIANTS = 64

_compiler_failed = False


@functools.cache
def load() -> None:
    """Make sure that torch can import its compiler, which every custom operator imports.

    The import fails if the folder for compiled code cannot be created. Then another folder is used,
    and the pointwise pass is not compiled in this process.
    """
    global _compiler_failed
    place = compat.compiler_cache()
    if place.is_dir() or not (place.exists() or place.is_symlink()):
        return
    _compiler_failed = True
    with tempfile.TemporaryDirectory() as folder:
        compat.import_compiler(folder)
    warnings.warn(
        f"the pointwise pass runs uncompiled, which is slower: {place} is not a folder",
        stacklevel=2,
    )


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
    """Call ``function``, compiled if ``compiled`` is true and the compiler works.

    Inside a dispatch mode, such as that of a memory tracker, nothing is compiled. The first
    argument is a tensor with a row for each token. Other tensors have as many rows, or none.
    """
    global _compiler_failed
    if compiled and not _compiler_failed and not compat.dispatch_mode_is_active():
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
