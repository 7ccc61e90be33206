"""How logits and their gradients lie in memory: rows of tiles, distances of rows, and the order."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lens_kernels import compat

# Rows of a tile begin at lines of a CPU's cache, of this many logits: at 50257 entries projections
# take 7 % less time than in rows without gaps (2 cores, hidden size 768 and 1600). The number of
# lines in a row is odd, or the rows of a column would share few places in the first cache: at 49152
# entries one line more saves 9 % of the projections and 9 % of the head's gradient (hidden size
# 576).
LINE = 16
# On a GPU products take rows in blocks of this many, and other numbers of rows waste a part of the
# last block.
BLOCK = 128
# Rows of a tile of logits on a GPU, and of the gradients that one product takes. The product for
# the head reads and writes its fp32 gradient, which takes as long as the arithmetic of 1050 rows.
TILE_ROWS, GRAD_ROWS = 512, 2048
# Rows of gradients begin at multiples of this many entries, as a GPU's products want it.
GRAD_LINE = 64


@compat.constant_in_graphs
def has_row_kernel(device: torch.device, compute: torch.dtype) -> bool:
    """Say whether the pass is the kernel over whole rows: on GPUs with Triton, in float32."""
    on_gpu = device.type == "cuda" and compute is torch.float32
    return on_gpu and importlib.util.find_spec("triton") is not None


class Piece(NamedTuple):
    """Neighbouring rows of one pair: tokens ``start`` to ``stop`` of those that are not masked."""

    pair: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The most rows of a tile of logits, and of the gradients that the products take at once.

    ``block`` divides both, unless there is no room for a block. If ``shared`` rows of several pairs
    stand in one tile. ``grad_stride`` is the distance of rows of gradients, and None where these
    take the place of the student's logits.
    """

    tile_rows: int
    grad_rows: int
    block: int = 1
    shared: bool = False
    grad_stride: int | None = None

    def steps(self, pairs: int, tokens: int) -> Iterator[list[list[Piece]]]:
        """Yield the tiles of each step, each as the pieces of its rows.

        A step ends with the products of all its gradients. Steps have about the same size.
        """
        runs, rows, step, tile = self._sizes(pairs, tokens)
        for first in range(0, runs * rows, rows or 1):
            for start in range(first, first + rows, step):
                stop = min(start + step, first + rows)
                tiles = range(start, stop, tile)
                yield [[*_pieces(at, min(at + tile, stop), tokens)] for at in tiles]

    def counts(self, pairs: int, tokens: int) -> tuple[int, int]:
        """Return the numbers of steps and of tiles."""
        runs, rows, step, tile = self._sizes(pairs, tokens)
        whole, rest = rows // step, rows % step  # torch.compile knows no divmod
        steps, tiles = whole + bool(rest), whole * math.ceil(step / tile) + math.ceil(rest / tile)
        return runs * steps, runs * tiles

    def _sizes(self, pairs: int, tokens: int) -> tuple[int, int, int, int]:
        """Return how many runs of rows there are, and the rows of a run, a step and a tile."""
        runs, rows = (1, pairs * tokens) if self.shared else (pairs, tokens)
        step = max(1, evened(rows, self.grad_rows, self.block))
        return runs, rows, step, max(1, evened(step, self.tile_rows, self.block))


def _pieces(start: int, stop: int, tokens: int) -> Iterator[Piece]:
    """Yield the pieces of rows that are numbered pair by pair."""
    while start < stop:
        pair, token = divmod(start, tokens)
        end = min(tokens, token + stop - start)
        yield Piece(pair, token, end)
        start += end - token


def evened(rows: int, limit: int, block: int = 1) -> int:
    """Return how many rows each part has, at most ``limit``, if all have about the same."""
    part = math.ceil(rows / max(1, math.ceil(rows / max(1, limit))))
    return min(rows, limit, math.ceil(part / block) * block)


def row_stride(vocab_size: int) -> int:
    """Return the distance of a tile's rows in logits."""
    return (math.ceil(vocab_size / LINE) | 1) * LINE


def grad_stride(vocab_size: int) -> int:
    """Return the distance of rows of gradients in entries."""
    return math.ceil(vocab_size / GRAD_LINE) * GRAD_LINE


def bytes_per_row(vocab_size: int, operand: torch.dtype, compute: torch.dtype) -> int:
    """Return the bytes of the tiles for one token, if gradients take the place of logits.

    These are both models' logits, and where products take 16-bit factors a copy of the gradient.
    """
    copy = 0 if operand == compute else operand.itemsize
    return row_stride(vocab_size) * 2 * compute.itemsize + vocab_size * copy


def in_place(tokens: int, bytes_per_row: int, workspace_bytes: int) -> Layout:
    """Return the layout in which gradients take the place of the student's logits."""
    rows = evened(tokens, max(1, workspace_bytes // bytes_per_row))
    return Layout(rows, rows)


def apart(rows: int, vocab_size: int, operand: torch.dtype, workspace_bytes: int) -> Layout:
    """Return the layout of fp32 logits and of gradients in ``operand``, for ``rows`` of all pairs.

    Half of the workspace is for the logits, unless they need less.
    """
    logits = 2 * row_stride(vocab_size) * torch.float32.itemsize
    stride = grad_stride(vocab_size)
    gradient = stride * operand.itemsize
    tile = min(TILE_ROWS, workspace_bytes // 2 // logits // BLOCK * BLOCK)
    if tile:
        step = min(GRAD_ROWS, (workspace_bytes - tile * logits) // gradient // BLOCK * BLOCK)
        block = BLOCK
    else:
        step = tile = max(1, workspace_bytes // (logits + gradient))
        block = 1
    step = evened(rows, step, block)
    return Layout(evened(step, tile, block), step, block, True, stride)
