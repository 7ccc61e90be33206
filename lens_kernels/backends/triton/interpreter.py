"""Triton's interpreter, which runs kernels without a GPU, and corrections of its bfloat16.

The interpreter of Triton 3.6 to 3.9 holds bfloat16 as the integers of its bit patterns. Its ``dot``
multiplies these integers, and its rounding to bfloat16 truncates. Here ``dot`` gets the numbers as
fp32, and rounding is to nearest even, as on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton
import triton.language as tl

# Whether kernels are interpreted rather than compiled. TRITON_INTERPRET=1 decides this when the
# kernels are imported.
INTERPRETING = bool(triton.knobs.runtime.interpret)


def _to_float(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


@functools.cache
def mend_bfloat16() -> None:
    """Replace the two operations of the interpreter that are wrong for bfloat16."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        def widened(x: Any) -> Any:
            if x.dtype.scalar != tl.bfloat16:
                return x
            return TensorHandle(_to_float(x.data), tl.float32)

        return dot(self, widened(a), widened(b), *args)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
