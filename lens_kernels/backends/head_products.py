"""The two products that turn a tile of logit gradients into those of hidden rows and head.

``Whole`` uses every entry. ``Active`` is the opt-in approximation: trained models put almost no
gradient on almost all of the vocabulary, so for a chunk of rows the entries with any |G| above a
threshold are gathered, and both products are made over them alone. The sum of what is left out is
known for every row; given to the mean of the head rows left out, it mends most of the hidden
gradient's error at the price of one outer product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lens_kernels.backends import matmul, tile_pass


@dataclass(frozen=True, eq=False)
class Whole:
    """A tile of gradients ``(R, V)`` and the head's weight ``(V, D)``, as factors."""

    grad: Tensor
    weight: Tensor

    def hidden_gradient(self) -> Tensor:
        """Return the gradient of the hidden rows, ``(R, D)``."""
        return matmul.product(self.grad, self.weight)

    def add_head_gradient(self, x: Tensor, out: Tensor) -> None:
        """Add the head's gradient to ``out``, ``(V, D)``."""
        matmul.add_head_gradient(self.grad, x, out)


@dataclass(frozen=True, eq=False)
class Active:
    """The columns of a tile that are used, and what is known of the rest."""

    columns: Tensor  # (n,)
    grad: Tensor  # (R, n)
    weight: Tensor  # (n, D)
    rest: Tensor  # (R,), the sum of the gradients left out
    rest_weight: Tensor  # (D,), the mean of the head rows left out

    def hidden_gradient(self) -> Tensor:
        """Return the gradient of the hidden rows, ``(R, D)``."""
        return torch.addr(matmul.product(self.grad, self.weight), self.rest, self.rest_weight)

    def add_head_gradient(self, x: Tensor, out: Tensor) -> None:
        """Add the head's gradient to ``out``, ``(V, D)``."""
        out.index_add_(0, self.columns, matmul.product(self.grad.t(), x))


def column_sums(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest, the sum and the sum of squares of every entry's absolute values."""
    size = grad.abs()
    return size.amax(0), size.sum(0), size.square().sum(0)


class Survey:
    """What a tile of gradients holds, read block by block: ``add`` all before asking."""

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self.rows = 0
        self.peak: Tensor  # (V,), the largest absolute value of every entry
        self.mass: Tensor  # (V,), the sum of absolute values of every entry
        self.squares: Tensor  # (V,), the sum of squares of every entry

    def add(self, grad: Tensor) -> None:
        """Survey a block of rows ``(R, V)``."""
        peak, mass, squares = tile_pass.run(self.compiled, column_sums, grad)
        if self.rows:
            peak = torch.maximum(self.peak, peak)
            mass, squares = self.mass + mass, self.squares + squares
        self.peak, self.mass, self.squares = peak, mass, squares
        self.rows += grad.shape[0]

    def columns(self, threshold: float, relative: bool) -> Tensor:
        """Return the entries with a gradient above the threshold, ``(n,)``.

        If ``relative`` it is one to the root mean square of the tile, so that all that is left out
        is, in the 2-norm, no more than this part of the tile. On a GPU this waits for the device,
        since the number of columns decides shapes.
        """
        entries = self.rows * self.peak.shape[0]
        bound = threshold * (self.squares.sum() / entries).sqrt() if relative else threshold
        # Not "above": a NaN is to be seen. An infinite bound would leave out infinities too.
        return (~((self.peak <= bound) & (bound < math.inf))).nonzero()[:, 0]


def active(
    grad: Tensor, weight: Tensor, weight_sum: Tensor, columns: Tensor, dtype: torch.dtype
) -> Active:
    """Return what the products need of ``grad`` if of its entries only ``columns`` are used.

    ``weight_sum`` is the sum of the head's rows and ``dtype`` that of the factors.
    """
    # Not index_select, which takes six times as long where rows have gaps.
    used, used_weight = grad[:, columns], weight.index_select(0, columns)
    left_out = max(1, grad.shape[1] - columns.shape[0])
    sums = weight_sum.dtype
    return Active(
        columns,
        used.to(dtype),
        used_weight,
        rest=grad.sum(1, dtype=sums) - used.sum(1, dtype=sums),
        rest_weight=(weight_sum - used_weight.sum(0, dtype=sums)) / left_out,
    )
