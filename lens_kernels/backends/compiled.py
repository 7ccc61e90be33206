"""Calls of pointwise functions. TorchInductor compiles them if the machine has a compiler."""

from __future__ import annotations

import functools
import importlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lens_kernels import compat

INDUCTOR: dict[str, Any] = {
    # These thresholds make Inductor recompute cheap values from the two tiles of logits instead of
    # storing them. By default it stores four blocks instead of one, and the pass takes 1.6 times as
    # long (2 cores).
    "realize_opcount_threshold": 1 << 30,
    "realize_reads_threshold": 1 << 30,
    # Fused multiply-add instructions save 10 % of the pass on a CPU.
    "cpp.enable_floating_point_contract_flag": "fast",
}
# On a GPU Inductor's default thresholds are good, but by default it splits reductions of up to 512
# rows. Only the number of rows may vary between calls. For a variable vocabulary size, Inductor's
# code would divide once per element.
INDUCTOR_GPU: dict[str, Any] = {"split_reductions": False}
# The most variants of a function that a process compiles. They differ in the divergence, in whether
# there is a gradient, a bias, or a softcap, and in whether there is a single row. Beyond torch's
# default limit of 8, torch would run the function eagerly.
VARIANTS = 64

_compiler_failed = False


@functools.cache
def load() -> None:
    """Make sure that torch's compiler can be imported. torch imports it for every custom operator.

    The import fails if the compiler's cache folder cannot be created. Then the compiler gets
    another folder, and the pointwise pass is not compiled in this process.
    """
    global _compiler_failed
    place = compat.compiler_cache()
    if place.is_dir() or not (place.exists() or place.is_symlink()):
        return
    _compiler_failed = True
    with tempfile.TemporaryDirectory() as folder, compat.compiler_cache_in(folder):
        importlib.import_module("torch._dynamo")
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
    """Call ``function``, compiled if ``compiled`` is true and the compiler works, else eagerly.

    The first argument is a tensor. The other tensors have as many rows, or no row dimension.
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
