"""The memory layout of logits and their gradients: sizes of tiles, row strides, and their order."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lens_kernels import compat

# Each row of a tile begins at a cache line of the CPU, which holds this many logits. With a
# vocabulary of 50257 the projections then take 7 % less time (2 cores, hidden size 768 and 1600).
# The number of cache lines in a row is odd. With an even number, all entries of a column would
# compete for few places in the first-level cache. With a vocabulary of 49152, one more line saves 9
# % of the time of the projections and of the head's gradient (hidden size 576).
LINE = 16
# GEMMs on a GPU process blocks of this many rows. With another number of rows, a part of the last
# block is wasted.
BLOCK = 128
# On a GPU, the number of rows in a tile of logits, and in a buffer of gradients. Each buffer is one
# operand of two GEMMs. One of them also reads and writes the fp32 head gradient, which takes as
# long as multiplying 1050 rows.
TILE_ROWS, GRAD_ROWS = 512, 2048
# The same buffer if the head is 16-bit. The float32 head gradient then takes twice the memory of
# the final one. With 8192 tokens of Llama-3, a smaller buffer keeps the peak within 1.3 GiB above
# 16-bit gradients. With this many rows, the products are predicted to take the same time.
NARROW_GRAD_ROWS = 1024
# Each row of gradients begins at a multiple of this many entries. Otherwise GEMMs on a GPU are
# slow.
GRAD_LINE = 64


@compat.constant_in_graphs
def has_row_kernel(
    device: torch.device, compute: torch.dtype, features: tuple[str, ...] = ()
) -> bool:
    """Return whether the pass runs as a Triton kernel: on CUDA devices with Triton, in float32.

    The kernel supports none of ``features``, which are those of ``LossCall``.
    """
    on_gpu = device.type == "cuda" and compute is torch.float32 and not features
    return on_gpu and importlib.util.find_spec("triton") is not None


class Piece(NamedTuple):
    """Some consecutive rows of one lens pair: its unmasked tokens ``start`` to ``stop``."""

    pair: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The largest numbers of rows in a tile of logits and in a GEMM over gradients.

    With enough rows, both are multiples of ``block``, which is 1 if the workspace has no room for
    more. With ``shared``, a tile may hold rows of several lens pairs. ``grad_stride`` is the row
    stride of the gradients, or None if the gradients overwrite the student's logits.
    """

    tile_rows: int
    grad_rows: int
    block: int = 1
    shared: bool = False
    grad_stride: int | None = None

    def steps(self, pairs: int, tokens: int) -> Iterator[list[list[Piece]]]:
        """Yield the tiles of each step. A tile is a list of pieces.

        At the end of a step, GEMMs process all of its gradients. All steps have about the same
        size.
        """
        runs, rows, step, tile = self._sizes(pairs, tokens)
        for first in range(0, runs * rows, rows or 1):
            for start in range(first, first + rows, step):
                stop = min(start + step, first + rows)
                tiles = range(start, stop, tile)
                yield [[*_pieces(at, min(at + tile, stop), tokens)] for at in tiles]

    def counts(self, pairs: int, tokens: int) -> tuple[int, int]:
        """Return the number of steps and the number of tiles of a call."""
        runs, rows, step, tile = self._sizes(pairs, tokens)
        whole, rest = rows // step, rows % step  # torch.compile does not support divmod
        steps, tiles = whole + bool(rest), whole * math.ceil(step / tile) + math.ceil(rest / tile)
        return runs * steps, runs * tiles

    def _sizes(self, pairs: int, tokens: int) -> tuple[int, int, int, int]:
        """Return the number of runs, and how many rows a run, a step and a tile have.

        A run has the rows of all pairs if pairs share tiles, and otherwise the rows of one pair.
        """
        runs, rows = (1, pairs * tokens) if self.shared else (pairs, tokens)
        step = max(1, evened(rows, self.grad_rows, self.block))
        return runs, rows, step, max(1, evened(step, self.tile_rows, self.block))


def _pieces(start: int, stop: int, tokens: int) -> Iterator[Piece]:
    """Yield the pieces of the rows ``start`` to ``stop``, counted through all pairs."""
    while start < stop:
        pair, token = divmod(start, tokens)
        end = min(tokens, token + stop - start)
        yield Piece(pair, token, end)
        start += end - token


def evened(rows: int, limit: int, block: int = 1) -> int:
    """Return the size of the parts if ``rows`` are divided into parts of about equal size.

    The size is at most ``limit``. With enough rows, it is a multiple of ``block``.
    """
    part = math.ceil(rows / max(1, math.ceil(rows / max(1, limit))))
    return min(rows, limit, math.ceil(part / block) * block)


def row_stride(vocab_size: int) -> int:
    """Return the distance between rows in a tile of logits, in elements."""
    return (math.ceil(vocab_size / LINE) | 1) * LINE


def grad_stride(vocab_size: int) -> int:
    """Return the distance between rows of gradients, in elements."""
    return math.ceil(vocab_size / GRAD_LINE) * GRAD_LINE


def bytes_per_row(vocab_size: int, operand: torch.dtype, compute: torch.dtype) -> int:
    """Return the bytes of the tiles for each row, if gradients overwrite the logits.

    The tiles hold the logits of both models and, if the GEMMs take 16-bit factors, a copy of the
    gradient.
    """
    copy = 0 if operand == compute else operand.itemsize
    return row_stride(vocab_size) * 2 * compute.itemsize + vocab_size * copy


def in_place(tokens: int, bytes_per_row: int, workspace_bytes: int) -> Layout:
    """Return the layout for a pass whose gradients overwrite the student's logits."""
    rows = evened(tokens, max(1, workspace_bytes // bytes_per_row))
    return Layout(rows, rows)


def apart(
    rows: int,
    vocab_size: int,
    operand: torch.dtype,
    workspace_bytes: int,
    head_grad: torch.dtype | None = None,
) -> Layout:
    """Return the layout for a pass that writes gradients to another buffer, in dtype ``operand``.

    ``rows`` is the number of rows of all pairs. The fp32 logits take at most half of the workspace.
    ``head_grad`` is the dtype of the head's final gradient, or None if it needs none.
    """
    most = GRAD_ROWS if head_grad is None or head_grad.itemsize > 2 else NARROW_GRAD_ROWS
    logits = 2 * row_stride(vocab_size) * torch.float32.itemsize
    stride = grad_stride(vocab_size)
    gradient = stride * operand.itemsize
    tile = min(TILE_ROWS, workspace_bytes // 2 // logits // BLOCK * BLOCK)
    if tile:
        step = min(most, (workspace_bytes - tile * logits) // gradient // BLOCK * BLOCK)
        block = BLOCK
    else:
        step = tile = max(1, workspace_bytes // (logits + gradient))
        block = 1
    step = evened(rows, step, block)
    return Layout(evened(step, tile, block), step, block, True, stride)
