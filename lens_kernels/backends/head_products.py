"""The two products that turn a tile of logit gradients into those of hidden rows and head.

``whole`` uses every entry. ``active`` is the opt-in approximation: trained models put almost no
gradient on almost all of the vocabulary, so for a group of rows the entries with any |G| above a
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

# Rows of a tile that share their active entries on a CPU, at least: fewer rows have fewer of them,
# but gather rows of the head more often. Groups of 86 rows instead of 341 use 5 % of the vocabulary
# instead of 12 %, or 11 % instead of 29 %, and take 0.8 and 0.7 of the time; with 43 rows it is no
# longer less, and more where the entries do not get fewer (2 cores, hidden states of students of
# SmolLM2-135M). On a GPU, which would wait for every group, a tile is one.
CPU_GROUP_ROWS = 96
# Active entries that are gathered at once on a CPU: what all of them need would leave the caches,
# and take memory that the system has to clear first.
CPU_ACTIVE_TILE = 3072
# The share of active entries above which the products of all of them take less time (2 cores,
# hidden size 576 to 1536).
WORTHWHILE = 0.4


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
    weight: Tensor,
    weight_sum: Tensor,
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


@dataclass(eq=False)
class Group:
    """Rows of a tile, and what they hold."""

    rows: slice
    peak: Tensor  # (V,), the largest absolute value of every entry
    mass: Tensor  # (V,), the sum of absolute values of every entry
    squares: Tensor  # (V,), the sum of squares of every entry


class Survey:
    """What a tile of gradients holds in groups of its rows, read block by block.

    ``add`` all before asking. A block is of one group.
    """

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self.groups: list[Group] = []

    def add(self, grad: Tensor) -> None:
        """Survey the next block of rows ``(R, V)``."""
        peak, mass, squares = tile_pass.run(self.compiled, column_sums, grad)
        last = self.groups[-1].rows if self.groups else slice(0, 0)
        stop = last.stop + grad.shape[0]
        full = grad.device.type == "cpu" and last.stop - last.start >= CPU_GROUP_ROWS
        if full or not self.groups:
            self.groups.append(Group(slice(last.stop, stop), peak, mass, squares))
            return
        group = self.groups[-1]
        group.rows = slice(last.start, stop)
        group.peak = torch.maximum(group.peak, peak)
        group.mass, group.squares = group.mass + mass, group.squares + squares

    def columns(self, threshold: float, relative: bool) -> list[Tensor]:
        """Return for each group the entries with a gradient above the threshold, ``(n,)``.

        If ``relative`` it is one to the root mean square of the tile, so that all that is left out
        is, in the 2-norm, no more than this part of the tile. On a GPU this waits for the device,
        since the number of columns decides shapes.
        """
        bound: Tensor | float = threshold
        if relative:
            squares = torch.stack([group.squares.sum() for group in self.groups]).sum()
            entries = self.groups[-1].rows.stop * self.groups[0].peak.shape[0]
            bound = threshold * (squares / entries).sqrt()
        # Not "above": a NaN is to be seen. An infinite bound would leave out infinities too.
        return [
            (~((group.peak <= bound) & (bound < math.inf))).nonzero()[:, 0] for group in self.groups
        ]
