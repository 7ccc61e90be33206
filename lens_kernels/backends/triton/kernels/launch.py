"""How a kernel is laid out over the device: its tile and its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# Arguments that vary from call to call. Triton would compile anew for some of their values.
COUNTS = ["tokens", "vocab_size", "tiles_per_split", "first_column"]


@dataclass(frozen=True)
class Tile:
    """The block sizes of tokens, vocabulary and hidden size, the warps, the pipeline stages."""

    block_n: int
    block_v: int
    block_k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        blocks = f"{self.block_n}x{self.block_v}x{self.block_k}"
        return f"{blocks}, {self.warps} warps, {self.stages} stages"

    def blocks(self) -> dict[str, int]:
        """Return the arguments of the kernel."""
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v, "BLOCK_K": self.block_k}

    def options(self) -> dict[str, Any]:
        """Return the options of the compiler."""
        # Triton 3.10 no longer fuses products and sums by default.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class SplitGrid:
    """A grid of row blocks by splits of the vocabulary. Splits are merged in their order.

    Row blocks vary first, so that programs that run together share tiles of the head.
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
        """Return ``number`` uninitialised fp32 tensors, ``(splits, tokens)`` each."""

        # Parts of one tensor would be aligned to 16 bytes for some numbers of tokens only, and
        # Triton compiles for either case.
        def one() -> Tensor:
            shape = (self.shape[1], self.tokens)
            return torch.empty(shape, dtype=torch.float32, device=self.device)

        return tuple(one() for _ in range(number))


def processors(device: torch.device) -> int:
    """Return the number of processors of a GPU, or 4 for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4
