"""Computes a tile of logits, for all sweeps: a block of rows times a block of the vocabulary."""

import triton
import triton.language as tl

from lens_kernels.backends.triton.kernels.device_fns import FLOOR, tanh


@triton.jit
def place_of(program, programs, blocks, group_blocks):
    """Return the block of rows and the part of the vocabulary of this program.

    Programs run group by group. A group has ``group_blocks`` blocks of rows; the last group may
    have fewer. Within a group, the next program takes the next block of rows. So programs that run
    at the same time read the same tiles of the head and the same rows.
    """
    parts = programs // blocks
    first = program // (group_blocks * parts) * group_blocks
    inside = program - first * parts
    size = tl.minimum(group_blocks, blocks - first)
    return first + inside % size, inside // size


@triton.jit
def rows_and_part(tokens, group_blocks, BLOCK_N: tl.constexpr):
    """Return this program's row indices, a mask of valid rows, and its part of the vocabulary.

    An invalid index is replaced by the index of the last row.
    """
    blocks = tl.cdiv(tokens, BLOCK_N)
    block, part = place_of(tl.program_id(0), tl.num_programs(0), blocks, group_blocks)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.minimum(rows, tokens - 1), rows < tokens, part


@triton.jit
def tiles_of_split(split, vocab_size, tiles_per_split, BLOCK_V: tl.constexpr):
    """Return the first tile of a part of the vocabulary, and the tile after its last.

    Every part has at least one tile. Every tile has at least one vocabulary entry.
    """
    first = split * tiles_per_split
    return first, tl.minimum(first + tiles_per_split, tl.cdiv(vocab_size, BLOCK_V))


@triton.jit
def load_stats(stats, rows):
    """Return the two numbers of each row's log-sum-exp, as column vectors."""
    maximum_ptr, log_sum_ptr = stats
    return tl.load(maximum_ptr + rows)[:, None], tl.load(log_sum_ptr + rows)[:, None]


@triton.jit
def capped(z, slope, cap):
    """Return ``y`` for a product ``z = x w^T + bias``: with a softcap, ``tanh(slope z / cap)``.

    The logit is ``y`` times the result of ``factor_of``.
    """
    if cap is not None:
        z = tanh(z * slope * (1.0 / cap))
    return z


@triton.jit
def factor_of(slope, cap):
    """Return the factor that turns a result of ``capped`` into a logit."""
    return slope if cap is None else cap


@triton.jit
def slope_at(y, slope, cap):
    """Return the derivative of a logit with respect to ``z``, given ``y = capped(z)``."""
    if cap is not None:
        slope = slope - (y * y) * slope
    return slope


@triton.jit
def logits_tile(
    operand,
    rows,
    columns,
    vocab_size,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return ``cap tanh(slope (x w^T + bias) / cap)``, ``(BLOCK_N, BLOCK_V)`` in fp32.

    ``operand`` is the result of ``Operand.arguments()``. Its last element is None, or holds a
    temperature for each row, by which the result is divided. With ``MASKED``, columns beyond the
    vocabulary are ``FLOOR``, so that they add nothing to sums. Otherwise they repeat the last
    column. Logits of -inf also become ``FLOOR``.
    """
    x_ptr, w_ptr, bias_ptr, width, x_stride, w_stride, slope, cap, own_ptr = operand
    column = tl.minimum(columns, vocab_size - 1)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + k[None, :]
    w_ptrs = w_ptr + column.to(tl.int64)[None, :] * w_stride + k[:, None]
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        fits = start + k < width
        x = tl.load(x_ptrs, mask=fits[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=fits[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    u = capped(z, slope, cap) * factor_of(slope, cap)
    if own_ptr is not None:
        u *= (1.0 / tl.load(own_ptr + rows))[:, None]
    if MASKED:
        u += tl.where(columns < vocab_size, 0.0, FLOOR)[None, :]
    return tl.maximum(u, FLOOR, propagate_nan=tl.PropagateNan.ALL)
