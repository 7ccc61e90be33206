"""The two GEMMs that turn a tile of logit gradients into the gradients of hidden rows and head.

``full_products`` uses every entry of the vocabulary. ``active_products`` is an optional
approximation for trained models, where most entries have almost no gradient. It uses only the
columns with a logit gradient ``|G|`` above a threshold in some row of the tile. Each row of ``G``
sums to zero, so the sum of the other entries is known. Their part of the hidden gradient is
approximated by that sum times the mean of the other head rows, which removes most of the error.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lens_kernels.backends import compiled, matmul

# On a CPU, the active columns are copied in groups of this size. A copy of all of them would exceed
# the caches, and would take new memory, which the system must clear first.
CPU_ACTIVE_TILE = 3072
# Above this share of active entries, the full products are faster. With a share of 60 %, active
# products take 0.82 to 0.87 of the full time (2 cores, hidden size 576 and 768).
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
    ``(R, D)`` the hidden rows of the tile. Unless ``begun`` is true, ``head_grad`` ``(V, D)`` is
    uninitialised, and is overwritten.
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
    """Approximate ``full_products``: use the active ``columns``, and the sum of all others.

    ``weight_sum`` ``(D,)`` is the sum of the head's rows.
    """
    sums = weight_sum.dtype
    hidden = grad.new_zeros(x.shape, dtype=sums)
    # After the loop, both tensors are sums over the columns that are not active.
    rest = grad.sum(1, dtype=sums)
    rest_weight = weight_sum.clone()
    step = CPU_ACTIVE_TILE if grad.device.type == "cpu" else max(1, columns.shape[0])
    for part in columns.split(step):
        used = grad[:, part]  # index_select would be six times slower on rows with this stride
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
    """Return for each column the maximum, the sum and the sum of squares of its absolute values."""
    size = grad.abs()
    return size.amax(0), size.sum(0), size.square().sum(0)


class Survey(ABC):
    """Statistics of the absolute values in a tile of logit gradients."""

    peak: Tensor  # the largest absolute value of every column, (V,)
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
        the skipped entries is then at most this multiple of the 2-norm of the tile. On a GPU this
        waits for the device, because the shape of the result depends on the values.
        """
        entries = self.rows * self.peak.shape[0]
        bound = threshold * (self.squares_of_all() / entries).sqrt() if relative else threshold
        # ``not <=`` also selects columns with NaN. If the bound is infinite, all columns are
        # active, because an infinite gradient must not be skipped.
        return (~((self.peak <= bound) & (bound < math.inf))).nonzero()[:, 0]


class ColumnStatistics(Survey):
    """Statistics that keep sums of each column. Blocks of rows are added one after the other."""

    def __init__(self, compile_sums: bool = False) -> None:
        self.compile_sums = compile_sums
        # The sums of absolute values and of squares of each column, (V,) each.
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


class RowStatistics(Survey):
    """Statistics that keep sums of each row and maxima of each column, filled by a kernel.

    The kernel takes the maximum of the bits of positive float32 numbers, read as integers. These
    integers have the same order as the numbers. A maximum does not depend on the order of rows.
    """

    def __init__(self, vocab_size: int, stride: int, device: torch.device) -> None:
        self.bits = torch.zeros(stride, dtype=torch.int32, device=device)
        self.peak = self.bits.view(torch.float32)[:vocab_size]
        self.mass: list[Tensor] = []
        self.squares: list[Tensor] = []

    def add(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tensors that a kernel must fill for ``rows`` more rows.

        They are the maxima of columns as bits, and for each row the sums of absolute values and of
        squares.
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
