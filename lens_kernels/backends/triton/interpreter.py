"""Mends the bfloat16 arithmetic of Triton's interpreter, which runs kernels without a GPU.

The interpreter of Triton 3.4 to 3.9 stores bfloat16 numbers as integers with their bits. Its
``dot`` multiplies these integers, and its conversion to bfloat16 truncates. After ``prepare``,
``dot`` gets the numbers as fp32, and conversion rounds to nearest even, as on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl

from lens_kernels import compat

# True if kernels run in the interpreter. Triton reads TRITON_INTERPRET when the kernels are
# imported.
INTERPRETING = bool(triton.knobs.runtime.interpret)

# imported here because numpy may be missing: neither Triton nor torch needs it
if INTERPRETING:
    import numpy as np


def _to_float(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


@functools.cache
def prepare() -> None:
    """Mend the interpreter's bfloat16, and make the interpreter faster. Later calls do nothing."""
    interpreter = compat.triton_interpreter()
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        def widened(x: Any) -> Any:
            return handle(_to_float(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

        return dot(self, widened(a), widened(b), *args)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return handle(_to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    @functools.cache
    def languages(function: Any) -> list[Any]:
        return [x for x in function.__globals__.values() if x is tl or x is tl.core]

    def once(patch: Any) -> Any:
        def patch_lang(function: Any) -> Any:
            # The interpreter patches Triton's language at every call of a device function. Once is
            # enough.
            patched = not any(tl.core.is_builtin(x.load) for x in languages(function))
            return None if patched else patch(function)

        return patch_lang

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    compat.wrap_language_patch(once)
