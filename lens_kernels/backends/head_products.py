"""The two products that turn a tile of logit gradients into those of hidden rows and head.

``whole`` uses every entry. ``active`` is the opt-in approximation: trained models put almost no
gradient on almost all of the vocabulary, so for a chunk of rows the entries with any |G| above a
threshold are gathered, and both products are made over them alone. The sum of what is left out is
known for every row; given to the mean of the head rows left out, it mends most of the hidden
gradient's error at the price of one outer product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lens_kernels.backends import matmul, tile_pass

# Active entries that are gathered at once on a CPU: what all of them need would leave the caches,
# and take memory that the system has to clear first.
CPU_ACTIVE_TILE = 3072
# The share of active entries above which the products of all take less time: those of 60 % take
# 0.82 to 0.87 of it (2 cores, hidden size 576 and 768).
WORTHWHILE = 2 / 3


def whole(
    grad: Tensor, weight: Tensor, x: Tensor, head_grad: Tensor | None, want_hidden: bool
) -> Tensor | None:
    """Add ``grad.T @ x`` to ``head_grad`` and return ``grad @ weight``, each if wanted.

    ``grad`` ``(R, V)`` is a tile of gradients, ``weight`` ``(V, D)`` the head's, ``x`` ``(R, D)``
    the rows of the tile and ``head_grad`` ``(V, D)``.
    """
    grad = grad.to(x.dtype)
    if head_grad is not None:
        matmul.add_head_gradient(grad, x, head_grad)
    return matmul.product(grad, weight) if want_hidden else None


def active(
    grad: Tensor,
    columns: Tensor,
    weight_sum: Tensor,
    weight: Tensor,
    x: Tensor,
    head_grad: Tensor | None,
    want_hidden: bool,
) -> Tensor | None:
    """Do as ``whole`` with the entries ``columns``, and their rest in sum.

    ``weight_sum`` ``(D,)`` is the sum of the head's rows.
    """
    sums = weight_sum.dtype
    hidden = grad.new_zeros(x.shape, dtype=sums)
    rest = grad.sum(1, dtype=sums)  # of the gradients left out
    rest_weight = weight_sum.clone()  # of the head rows left out
    step = CPU_ACTIVE_TILE if grad.device.type == "cpu" else max(1, columns.shape[0])
    for part in columns.split(step):
        used = grad[:, part]  # not index_select: six times as long where rows have gaps
        factor = used.to(x.dtype)
        if head_grad is not None:
            head_grad.index_add_(0, part, matmul.product(factor.t(), x))
        if want_hidden:
            used_weight = weight.index_select(0, part)
            hidden += matmul.product(factor, used_weight)
            rest -= used.sum(1, dtype=sums)
            rest_weight -= used_weight.sum(0, dtype=sums)
    left_out = max(1, grad.shape[1] - columns.shape[0])
    return hidden.addr_(rest, rest_weight / left_out) if want_hidden else None


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
