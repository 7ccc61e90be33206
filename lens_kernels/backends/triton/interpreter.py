"""Triton's interpreter, which stands for a GPU where there is none, with its bfloat16 mended.

The interpreter (numpy; Triton 3.4 to 3.9) holds bfloat16 as the integers of its bit patterns. It
multiplies those as integers in ``dot``, and rounds to bfloat16 by cutting digits off. Here ``dot``
gets what the integers mean, and rounding goes to nearest even, as on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl

# Whether kernels are interpreted rather than compiled: by TRITON_INTERPRET=1 at import, which is
# when the kernels themselves take one form or the other.
INTERPRETING = bool(triton.knobs.runtime.interpret)

if INTERPRETING:  # neither Triton nor torch installs numpy, and compiled kernels do not need it
    import numpy as np


def _to_float(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


@functools.cache
def mend_bfloat16() -> None:
    """Replace the two operations of the interpreter that get bfloat16 wrong."""
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
