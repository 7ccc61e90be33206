"""How a sweep is laid out over the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lens_kernels.backends.triton.tiles import Tile

# Arguments that vary from call to call, for whose values nothing is compiled anew.
COUNTS = ["tokens", "vocab_size", "tiles_per_split", "first_column"]


class Splits:
    """A grid of row blocks by vocabulary splits, whose results are merged in the order of splits.

    Row blocks come first: programs that run together share the tiles of the head.
    """

    def __init__(self, tokens: int, vocab_size: int, tile: Tile, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        blocks = triton.cdiv(tokens, tile.block_n)
        tiles = triton.cdiv(vocab_size, tile.block_v)
        # Two programs for each processor, or one for each tile.
        splits = min(tiles, triton.cdiv(2 * processors(device), blocks))
        self.tiles_per_split = triton.cdiv(tiles, splits)
        self.shape = (blocks, triton.cdiv(tiles, self.tiles_per_split))

    def partials(self, number: int) -> tuple[Tensor, ...]:
        """Return space for ``number`` values of every row and split, ``(splits, tokens)`` each."""

        # One block would put some at addresses that are multiples of 16 or not, by the number of
        # tokens, and each case would be compiled.
        def one() -> Tensor:
            shape = (self.shape[1], self.tokens)
            return torch.empty(shape, dtype=torch.float32, device=self.device)

        return tuple(one() for _ in range(number))


def processors(device: torch.device) -> int:
    """Return the number of processors of a GPU; the interpreter stands for one with four."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4
