"""The block sizes and the grid with which kernels are launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lens_kernels.backends import row_groups

# Arguments whose values change from call to call. Triton must not compile special kernels for some
# of the values.
COUNTS = ["tokens", "vocab_size", "tiles_per_split", "group_blocks", "first_column"]


@dataclass(frozen=True)
class Tile:
    """Block sizes over tokens, vocabulary and hidden size, and the number of warps and stages."""

    block_n: int
    block_v: int
    block_k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        blocks = f"{self.block_n}x{self.block_v}x{self.block_k}"
        return f"{blocks}, {self.warps} warps, {self.stages} stages"

    def blocks(self) -> dict[str, int]:
        """Return the block sizes as keyword arguments of a kernel."""
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v, "BLOCK_K": self.block_k}

    def options(self) -> dict[str, Any]:
        """Return the compiler options as keyword arguments of a launch."""
        # From Triton 3.10 on, multiplications and additions are fused only with enable_fp_fusion.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class SplitGrid:
    """The programs of a sweep: one for each block of rows and part of the vocabulary.

    ``place_of`` defines the order of programs. The results of parts are merged in a fixed order.
    """

    def __init__(self, tokens: int, vocab_size: int, tile: Tile, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        blocks = triton.cdiv(tokens, tile.block_n)
        tiles = triton.cdiv(vocab_size, tile.block_v)
        self.group_blocks = row_groups.group_blocks(tokens, tile.block_n)
        # Each group of rows gets at least two programs per multiprocessor, if there are enough
        # tiles.
        splits = min(tiles, triton.cdiv(2 * processors(device), self.group_blocks))
        self.tiles_per_split = triton.cdiv(tiles, splits)
        self.splits = triton.cdiv(tiles, self.tiles_per_split)
        self.shape = (blocks * self.splits,)

    def partials(self, number: int) -> tuple[Tensor, ...]:
        """Return ``number`` uninitialised fp32 tensors of shape ``(splits, tokens)``."""

        # The tensors are separate. Views of one tensor would be aligned to 16 bytes only for some
        # numbers of tokens, and Triton would compile a kernel for each case.
        def one() -> Tensor:
            return torch.empty(self.splits, self.tokens, dtype=torch.float32, device=self.device)

        return tuple(one() for _ in range(number))


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, or 4 for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4
