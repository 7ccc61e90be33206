"""The two GEMMs that turn a tile of logit gradients into the gradients of hidden rows and head.

``full_products`` uses every entry of the vocabulary. ``active_products`` is an optional
approximation for trained models, where most entries have almost no gradient. It uses only the
vocabulary entries whose logit gradient ``|G|`` exceeds a threshold in some row of the tile. Each
row of ``G`` sums to zero, so the sum over the skipped entries is known. Times the mean head row of
the skipped entries, this sum approximates their part of the hidden gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lens_kernels.backends import compiled, matmul

# The number of active columns that are copied at a time on a CPU. A copy of all active columns
# would not fit into the CPU's caches.
CPU_ACTIVE_TILE = 3072
# If a larger share of the columns is active, the full GEMMs are faster. At 60 %,
# ``active_products`` takes 0.82 to 0.87 of the full time (2 cores, hidden size 576 and 768).
MAX_ACTIVE_SHARE = 2 / 3


def full_products(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    head_grad: Tensor | None,
    need_hidden: bool,
    begun: bool = True,
) -> Tensor | None:
    """Add ``grad.T @ x`` to ``head_grad`` if given, and return ``grad @ weight`` if needed.

    ``grad`` ``(R, V)`` is a tile of logit gradients, ``weight`` ``(V, D)`` the head, and ``x``
    ``(R, D)`` the hidden states of the tile's rows. If ``begun`` is false, ``head_grad`` ``(V, D)``
    is uninitialised memory and is overwritten.
    """
    grad = grad.to(x.dtype)
    if head_grad is not None:
        matmul.add_head_gradient(grad, x, head_grad, begun)
    return matmul.product(grad, weight) if need_hidden else None


def active_products(
    grad: Tensor,
    columns: Tensor,
    weight_sum: Tensor,
    weight: Tensor,
    x: Tensor,
    head_grad: Tensor | None,
    need_hidden: bool,
) -> Tensor | None:
    """Approximate ``full_products`` from the ``active`` columns and the sum of all other columns.

    ``weight_sum`` ``(D,)`` is the sum of the head's rows.
    """
    sums = weight_sum.dtype
    hidden = grad.new_zeros(x.shape, dtype=sums)
    # The loop turns these sums over all columns into sums over the inactive columns.
    rest = grad.sum(1, dtype=sums)
    rest_weight = weight_sum.clone()
    step = CPU_ACTIVE_TILE if grad.device.type == "cpu" else max(1, columns.shape[0])
    for part in columns.split(step):
        # index_select would take six times as long, because of the stride of the rows
        used = grad[:, part]
        factor = used.to(x.dtype)
        if head_grad is not None:
            head_grad.index_add_(0, part, matmul.product(factor.t(), x))
        if need_hidden:
            used_weight = weight.index_select(0, part)
            hidden += matmul.product(factor, used_weight)
            rest -= used.sum(1, dtype=sums)
            rest_weight -= used_weight.sum(0, dtype=sums)
    left_out = max(1, grad.shape[1] - columns.shape[0])
    return hidden.addr_(rest, rest_weight / left_out) if need_hidden else None


def column_sums(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each column's maximum, sum and sum of squares of absolute values."""
    size = grad.abs()
    return size.amax(0), size.sum(0), size.square().sum(0)


class GradientStatistics(ABC):
    """Statistics of the absolute values in a tile of logit gradients."""

    peak: Tensor  # the largest absolute value in each column, (V,)
    rows = 0

    @abstractmethod
    def total(self) -> Tensor:
        """Return the sum of the absolute values of all entries."""

    @abstractmethod
    def squares_of_all(self) -> Tensor:
        """Return the sum of the squares of all entries."""

    @abstractmethod
    def left_out(self, grad: Tensor, active: Tensor) -> Tensor:
        """Return the sum of the absolute values of all entries outside the columns ``active``."""

    def active(self, threshold: float | Tensor, relative: bool) -> Tensor:
        """Return the indices of the columns with a gradient above the threshold, ``(n,)``.

        A ``relative`` threshold is a multiple of the root mean square of the tile. The 2-norm of
        the skipped entries is then at most this multiple of the 2-norm of the tile. On a GPU the
        host waits, because the size of the result depends on the values.
        """
        entries = self.rows * self.peak.shape[0]
        bound = threshold * (self.squares_of_all() / entries).sqrt() if relative else threshold
        # ``not <=`` also selects columns with NaN. An infinite bound selects all columns, so that
        # infinite gradients are not skipped.
        return (~((self.peak <= bound) & (bound < math.inf))).nonzero()[:, 0]


class ColumnStatistics(GradientStatistics):
    """Statistics kept as sums over each column. Blocks of rows are added one by one."""

    def __init__(self, compile_sums: bool = False) -> None:
        self.compile_sums = compile_sums
        # each column's sum of absolute values, and its sum of squares, (V,)
        self.mass: Tensor
        self.squares: Tensor

    def add(self, grad: Tensor) -> None:
        """Add the gradients of a block of rows, ``(R, V)``."""
        peak, mass, squares = compiled.call(self.compile_sums, column_sums, grad)
        if self.rows:
            peak = torch.maximum(self.peak, peak)
            mass, squares = self.mass + mass, self.squares + squares
        self.peak, self.mass, self.squares = peak, mass, squares
        self.rows += grad.shape[0]

    def total(self) -> Tensor:
        """Return the sum of the absolute values of all entries."""
        return self.mass.sum()

    def squares_of_all(self) -> Tensor:
        """Return the sum of the squares of all entries."""
        return self.squares.sum()

    def left_out(self, grad: Tensor, active: Tensor) -> Tensor:
        """Return the sum of the absolute values of all entries outside the columns ``active``."""
        return self.mass.index_fill(0, active, 0.0).sum()


class RowStatistics(GradientStatistics):
    """Statistics that a Triton kernel fills: sums over each row, and the maximum of each column.

    The kernel compares the bits of absolute values as integers, which have the same order as
    positive floating-point numbers.
    """

    def __init__(self, vocab_size: int, stride: int, device: torch.device) -> None:
        self.bits = torch.zeros(stride, dtype=torch.int32, device=device)
        self.peak = self.bits.view(torch.float32)[:vocab_size]
        self.mass: list[Tensor] = []
        self.squares: list[Tensor] = []

    def add(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tensors that a kernel must fill for ``rows`` more rows.

        The first tensor has the maximum of each column, as bits. The second and third have the sum
        of absolute values and the sum of squares of each row.
        """
        self.rows += rows
        for sums in (self.mass, self.squares):
            sums.append(self.peak.new_empty(rows))
        return self.bits, self.mass[-1], self.squares[-1]

    def total(self) -> Tensor:
        """Return the sum of the absolute values of all entries."""
        return torch.cat(self.mass).sum()

    def squares_of_all(self) -> Tensor:
        """Return the sum of the squares of all entries."""
        return torch.cat(self.squares).sum()

    def left_out(self, grad: Tensor, active: Tensor) -> Tensor:
        """Return the sum of the absolute values of all entries outside the columns ``active``."""
        return (self.total() - grad[:, active].abs().sum(dtype=self.peak.dtype)).clamp(min=0)
