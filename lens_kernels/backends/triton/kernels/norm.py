"""The final norm of a model and its backward pass. Rows are gathered and rounded only once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lens_kernels.backends.triton.kernels import launch
from lens_kernels.backends.triton.kernels.operands import padded
from lens_kernels.lens import LensNorm

# The number of elements that a program holds in registers at a time.
BLOCK = 4096


@triton.jit
def normalised_rows(
    x_ptr, index_ptr, x_stride, first, tokens, width, eps,
    LAYER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normalise a block of rows. Return ``(x_hat, rstd, source, valid)``.

    ``x_hat`` are the normalised rows, with 0 beyond their width, and ``rstd`` is their inverse
    scale. ``source`` are the indices of the rows, and ``valid`` is False beyond the last row.
    """
    rows = first + tl.arange(0, BLOCK_N)
    valid = rows < tokens
    rows = tl.minimum(rows, tokens - 1)
    source = rows
    if index_ptr is not None:
        source = tl.load(index_ptr + rows)
    columns = tl.arange(0, BLOCK_D)
    inside = (columns < width)[None, :]
    offsets = source.to(tl.int64)[:, None] * x_stride + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if LAYER:
        x = tl.where(inside, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    return x * rstd[:, None], rstd, source, valid


@triton.jit(do_not_specialize=launch.COUNTS)
def norm_kernel(
    x_ptr, index_ptr, weight_ptr, bias_ptr, out_ptr,
    x_stride, out_stride, tokens, width, eps, offset,
    LAYER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write ``x_hat (weight + offset) + bias`` for the indexed rows, and pad the rows with 0."""
    first = tl.program_id(0) * BLOCK_N
    y, _, _, valid = normalised_rows(
        x_ptr, index_ptr, x_stride, first, tokens, width, eps, LAYER, BLOCK_N, BLOCK_D
    )
    columns = tl.arange(0, BLOCK_D)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        y *= (weight + offset)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        y += bias[None, :]
    rows = first + tl.arange(0, BLOCK_N)
    offsets = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    mask = valid[:, None] & (columns < out_stride)[None, :]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=launch.COUNTS)
def norm_backward_kernel(
    grad_ptr, x_ptr, index_ptr, weight_ptr,
    d_x_ptr, d_weight_ptr, d_bias_ptr,
    grad_stride, x_stride, d_x_stride, tokens, width, eps, offset,
    LAYER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the indexed rows, and a part of the gradients of weight and bias.

    Each program takes every ``num_programs``-th block of rows, so that sums have a fixed order.
    """
    columns = tl.arange(0, BLOCK_D)
    inside = (columns < width)[None, :]
    d_weight = tl.zeros((BLOCK_D,), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(tl.program_id(0) * BLOCK_N, tokens, tl.num_programs(0) * BLOCK_N):
        x_hat, rstd, source, valid = normalised_rows(
            x_ptr, index_ptr, x_stride, first, tokens, width, eps, LAYER, BLOCK_N, BLOCK_D
        )
        rows = first + tl.arange(0, BLOCK_N)
        offsets = rows.to(tl.int64)[:, None] * grad_stride + columns[None, :]
        grad = tl.load(grad_ptr + offsets, mask=valid[:, None] & inside, other=0.0)
        if d_weight_ptr is not None:
            d_weight += tl.sum(grad * x_hat, 0)
        if d_bias_ptr is not None:
            d_bias += tl.sum(grad, 0)
        if d_x_ptr is not None:
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0)
                grad *= (weight.to(tl.float32) + offset)[None, :]
            inner = grad - x_hat * (tl.sum(grad * x_hat, 1) / width)[:, None]
            if LAYER:
                inner -= (tl.sum(grad, 1) / width)[:, None]
            offsets = source.to(tl.int64)[:, None] * d_x_stride + columns[None, :]
            tl.store(d_x_ptr + offsets, inner * rstd[:, None], mask=valid[:, None] & inside)
    offsets = tl.program_id(0).to(tl.int64) * width + columns
    if d_weight_ptr is not None:
        tl.store(d_weight_ptr + offsets, d_weight, mask=columns < width)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + offsets, d_bias, mask=columns < width)


def _options(norm: LensNorm, width: int) -> dict[str, int | bool]:
    # The padded width can exceed the next power of two of the width.
    block_d = triton.next_power_of_2(padded(width))
    block_n = max(1, BLOCK // block_d)
    return {
        "LAYER": norm.kind == "layer",
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": min(16, max(4, block_n * block_d // 512)),
    }


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def norm_rows(hidden: Tensor, index: Tensor | None, norm: LensNorm, dtype: torch.dtype) -> Tensor:
    """Return the rows of ``hidden`` at ``index``, normalised and padded for ``Operand``."""
    tokens = hidden.shape[0] if index is None else index.shape[0]
    width = hidden.shape[1]
    options = _options(norm, width)
    hidden = _unit_stride(hidden)
    out = torch.empty(tokens, padded(width), dtype=dtype, device=hidden.device)
    norm_kernel[(triton.cdiv(tokens, options["BLOCK_N"]),)](
        hidden, index, _contiguous(norm.weight), _contiguous(norm.bias), out,
        hidden.stride(0), out.stride(0), tokens, width, norm.eps, norm.offset, **options,
    )  # fmt: skip
    return out[:, :width]


def norm_backward(
    grad: Tensor,
    hidden: Tensor,
    index: Tensor | None,
    norm: LensNorm,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Propagate the gradient ``grad`` ``(n, D)`` of normalised rows back through the norm.

    The rows of ``d_hidden`` at ``index`` are set. The gradients of the norm's weight and bias are
    added to ``d_weight`` and ``d_bias``.
    """
    tokens, width = grad.shape
    options = _options(norm, width)
    hidden = _unit_stride(hidden)
    programs = min(triton.cdiv(tokens, options["BLOCK_N"]), 2 * launch.processors(grad.device))

    def partial(total: Tensor | None) -> Tensor | None:
        return None if total is None else torch.empty(programs, width, device=grad.device)

    d_weights, d_biases = partial(d_weight), partial(d_bias)
    norm_backward_kernel[(programs,)](
        grad, hidden, index, _contiguous(norm.weight), d_hidden, d_weights, d_biases,
        grad.stride(0), hidden.stride(0), 0 if d_hidden is None else d_hidden.stride(0),
        tokens, width, norm.eps, norm.offset, **options,
    )  # fmt: skip
    for total, partials in ((d_weight, d_weights), (d_bias, d_biases)):
        if total is not None and partials is not None:
            total += partials.sum(0)
