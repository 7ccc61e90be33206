"""The sweep before the others for standardised logits: each row's mean and standard deviation.

The softmax does not depend on the mean of its logits. So standardised logits are logits with a
temperature of the row's own, ``T s``. Only their gradient has one more term. The formulas are in
``standardized.py`` of the ``torch`` backend. The sum over the vocabulary in that term needs no
sweep of its own: ``G`` sums to 0, so ``sum(G z') = T sum(G log q)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lens_kernels.backends.triton.kernels import launch
from lens_kernels.backends.triton.kernels.launch import SplitGrid, Tile
from lens_kernels.backends.triton.kernels.logits import logits_tile, rows_and_part, tiles_of_split
from lens_kernels.backends.triton.kernels.operands import Operand


@triton.jit(do_not_specialize=launch.COUNTS)
def deviations_kernel(
    operand,
    mean_ptr,
    squares_ptr,
    lowest_ptr,
    highest_ptr,
    tokens,
    vocab_size,
    tiles_per_split,
    group_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the mean, squared deviations and range of logits, for a block of rows and one part."""
    rows, valid, split = rows_and_part(tokens, group_blocks, BLOCK_N)
    mean = tl.zeros((BLOCK_N,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    lowest = tl.full((BLOCK_N,), float("inf"), dtype=tl.float32)
    highest = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    first, last = tiles_of_split(split, vocab_size, tiles_per_split, BLOCK_V)
    # Merge the mean and the squared deviations of each tile. A sum of squares of the logits
    # themselves would lose digits where their mean is large.
    for tile in range(first, last):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        u = logits_tile(
            operand, rows, columns, vocab_size, BLOCK_N, BLOCK_V, BLOCK_K, PRECISION, False
        )
        inside = (columns < vocab_size)[None, :]
        before = (tile - first) * BLOCK_V * 1.0
        count = tl.minimum(vocab_size - tile * BLOCK_V, BLOCK_V) * 1.0
        tile_mean = tl.sum(tl.where(inside, u, 0.0), 1) / count
        centred = tl.where(inside, u - tile_mean[:, None], 0.0)
        shift = tile_mean - mean
        share = count / (before + count)
        squares += tl.sum(centred * centred, 1) + shift * shift * (before * share)
        mean += shift * share
        lowest = tl.minimum(lowest, tl.min(u, 1))
        highest = tl.maximum(highest, tl.max(u, 1))
    offsets = split.to(tl.int64) * tokens + rows
    tl.store(mean_ptr + offsets, mean, mask=valid)
    tl.store(squares_ptr + offsets, squares, mask=valid)
    tl.store(lowest_ptr + offsets, lowest, mask=valid)
    tl.store(highest_ptr + offsets, highest, mask=valid)


@dataclass(frozen=True, eq=False)
class Standardized:
    """A model whose rows of logits are standardised, with numbers of each row, ``(N,)``.

    ``operand`` has the temperatures ``T s``. Its logits have the mean ``mean``. ``constant`` marks
    rows whose logits are all equal; their temperature is 1.
    """

    operand: Operand
    mean: Tensor
    constant: Tensor
    temperature: float

    def correction(self, moment: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Return the mean of ``z'`` over ``T``, and the factor of this ``z' / T`` in the gradient.

        ``moment`` is the sum of ``G log q``.
        """
        return self.mean, moment * (self.temperature**2 / max(1, vocab_size - 1))


def standardized(operand: Operand, vocab_size: int, tile: Tile) -> Standardized:
    """Return the operand with standardised logits over its temperature."""
    plain = operand.untempered()
    grid = SplitGrid(operand.tokens, vocab_size, tile, operand.x.device)
    partials = grid.partials(4)
    deviations_kernel[grid.shape](
        plain.arguments(), *partials,
        operand.tokens, vocab_size, grid.tiles_per_split, grid.group_blocks,
        **tile.blocks(), PRECISION=operand.precision, **tile.options(),
    )  # fmt: skip
    mean, squares, lowest, highest = partials
    size = grid.tiles_per_split * tile.block_v
    first = torch.arange(grid.splits, device=mean.device) * size
    count = (vocab_size - first).clamp(max=size)[:, None].to(mean.dtype)
    centre = (mean * count).sum(0) / vocab_size
    total = (squares + (mean - centre).square() * count).sum(0)
    deviation = (total / max(1, vocab_size - 1)).sqrt()
    # The mean of equal logits is rounded, so their deviation may be above 0.
    constant = (highest.amax(0) <= lowest.amin(0)) | (deviation == 0)
    own = torch.where(constant, 1.0, deviation * operand.temperature)
    return Standardized(
        replace(plain, temperatures=own), centre / own, constant, operand.temperature
    )
