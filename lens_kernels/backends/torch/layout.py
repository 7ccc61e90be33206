"""The memory layout of logits and their gradients: sizes and order of tiles, and row strides."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lens_kernels import compat

# The number of fp32 logits in a cache line of the CPU. Each row of logits begins at a cache line,
# which saves 7 % of the time of the projections (vocabulary of 50257, 2 cores). A row takes an odd
# number of cache lines. With an even number, the entries of a column would compete for a few places
# in the CPU's cache.
LINE = 16
# The number of rows in a block of a GEMM on a GPU. If the rows do not fill the last block, a part
# of its work is wasted.
BLOCK = 128
# On a GPU, the numbers of rows in a tile of logits and in a buffer of gradients. The head's GEMM
# also reads and writes the fp32 head gradient, which takes as long as multiplying 1050 rows. So its
# buffer has more rows.
TILE_ROWS, GRAD_ROWS = 512, 2048
# The rows of a smaller buffer of gradients, for 16-bit heads. Their float32 head gradient takes
# twice the memory of the final gradient. With 8192 tokens of Llama-3, the smaller buffer keeps the
# peak within 1.3 GiB above the 16-bit gradients. GEMMs over 1024 rows are predicted to take the
# same time.
NARROW_GRAD_ROWS = 1024
# On a GPU, the sets of tiles. With two sets, ``tile_sets.py`` uses a second stream.
TILE_SETS = 1
# On a GPU, the row stride of gradients is a multiple of 64 entries, because GEMMs would be slow
# with other strides.
GRAD_LINE = 64
# The row kernel has these features of a call. On a GPU, Inductor compiles the pass of a call with
# any other feature: label smoothing and ghost entries need more sums over a row.
ROW_KERNEL_FEATURES = frozenset({"SparseTargets", "standardize", "token_clip"})


@compat.constant_in_graphs
def has_row_kernel(
    device: torch.device,
    compute: torch.dtype,
    features: tuple[str, ...] = (),
    sharded: bool = False,
) -> bool:
    """Return whether a Triton kernel computes losses and gradients of logits.

    The kernel needs a CUDA device, Triton and float32. ``features`` are those of ``LossCall``. The
    kernels for a vocabulary that is ``sharded`` over ranks support none of them.
    """
    served = not features if sharded else ROW_KERNEL_FEATURES.issuperset(features)
    on_gpu = device.type == "cuda" and compute is torch.float32 and served
    return on_gpu and importlib.util.find_spec("triton") is not None


class Piece(NamedTuple):
    """Consecutive rows of one lens pair: its unmasked tokens ``start`` to ``stop``."""

    pair: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The maximum number of rows in a tile of logits, and in a GEMM over logit gradients.

    Both are multiples of ``block``, unless the call has fewer rows. With ``shared``, a tile may
    hold rows of several lens pairs. ``grad_stride`` is the row stride of the gradients, or None if
    gradients overwrite the student's logits. ``sets`` is the number of tiles in memory, for each
    model.
    """

    tile_rows: int
    grad_rows: int
    block: int = 1
    shared: bool = False
    grad_stride: int | None = None
    sets: int = 1

    def steps(self, pairs: int, tokens: int) -> Iterator[list[list[Piece]]]:
        """Yield the tiles of each step. A tile is a list of pieces.

        After the tiles of a step, two GEMMs process all logit gradients of the step. Steps have
        about equal sizes.
        """
        runs, rows, step, tile = self._sizes(pairs, tokens)
        for first in range(0, runs * rows, rows or 1):
            for start in range(first, first + rows, step):
                stop = min(start + step, first + rows)
                tiles = range(start, stop, tile)
                yield [[*_pieces(at, min(at + tile, stop), tokens)] for at in tiles]

    def counts(self, pairs: int, tokens: int) -> tuple[int, int]:
        """Return the number of steps and of tiles of a call."""
        runs, rows, step, tile = self._sizes(pairs, tokens)
        whole, rest = rows // step, rows % step  # torch.compile does not support divmod
        steps, tiles = whole + bool(rest), whole * math.ceil(step / tile) + math.ceil(rest / tile)
        return runs * steps, runs * tiles

    def _sizes(self, pairs: int, tokens: int) -> tuple[int, int, int, int]:
        runs, rows = (1, pairs * tokens) if self.shared else (pairs, tokens)
        step = max(1, evened(rows, self.grad_rows, self.block))
        return runs, rows, step, max(1, evened(step, self.tile_rows, self.block))


def _pieces(start: int, stop: int, tokens: int) -> Iterator[Piece]:
    while start < stop:
        pair, token = divmod(start, tokens)
        end = min(tokens, token + stop - start)
        yield Piece(pair, token, end)
        start += end - token


def evened(rows: int, limit: int, block: int = 1) -> int:
    """Return the size of each part if ``rows`` are divided into parts of about equal size.

    The size is at most ``limit``. It is a multiple of ``block`` if there are enough rows.
    """
    part = math.ceil(rows / max(1, math.ceil(rows / max(1, limit))))
    return min(rows, limit, math.ceil(part / block) * block)


def row_stride(vocab_size: int) -> int:
    """Return the distance between the rows of a tile of logits, in elements."""
    return (math.ceil(vocab_size / LINE) | 1) * LINE


def grad_stride(vocab_size: int) -> int:
    """Return the distance between the rows of a buffer of gradients, in elements."""
    return math.ceil(vocab_size / GRAD_LINE) * GRAD_LINE


def bytes_per_row(vocab_size: int, operand: torch.dtype, compute: torch.dtype) -> int:
    """Return the bytes in memory for each token, if gradients overwrite the student's logits.

    Each token has the logits of both models. If the GEMMs take 16-bit factors, it also has a copy
    of its logit gradients.
    """
    copy = 0 if operand == compute else operand.itemsize
    return row_stride(vocab_size) * 2 * compute.itemsize + vocab_size * copy


def in_place(tokens: int, bytes_per_row: int, workspace_bytes: int) -> Layout:
    """Return the layout if gradients overwrite the student's logits."""
    rows = evened(tokens, max(1, workspace_bytes // bytes_per_row))
    return Layout(rows, rows)


def apart(
    rows: int,
    vocab_size: int,
    operand: torch.dtype,
    workspace_bytes: int,
    head_grad: torch.dtype | None = None,
    sharded: bool = False,
) -> Layout:
    """Return the layout if gradients go to a buffer of their own, in dtype ``operand``.

    ``rows`` is the number of rows of all pairs. The fp32 logits take at most half of the workspace.
    ``head_grad`` is the dtype of the head's final gradient, or None if it needs none. ``sharded``
    heads use one set of tiles.
    """
    most = GRAD_ROWS if head_grad is None or head_grad.itemsize > 2 else NARROW_GRAD_ROWS
    sets = 1 if sharded else TILE_SETS
    logits = 2 * row_stride(vocab_size) * torch.float32.itemsize
    stride = grad_stride(vocab_size)
    gradient = stride * operand.itemsize
    tile = min(TILE_ROWS, workspace_bytes // 2 // (sets * logits) // BLOCK * BLOCK)
    if tile:
        step = min(most, (workspace_bytes - sets * tile * logits) // gradient // BLOCK * BLOCK)
        block = BLOCK
    else:
        step = tile = max(1, workspace_bytes // (logits + gradient))
        block = sets = 1
    step = evened(rows, step, block)
    return Layout(evened(step, tile, block), step, block, True, stride, sets)
