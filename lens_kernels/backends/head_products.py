"""The two GEMMs that turn a tile of logit gradients into the gradients of hidden rows and head.

``full_products`` uses every entry of the vocabulary. ``active_products`` is an optional
approximation: most entries of trained models have almost no gradient. It uses only the entries for
which some |G| in the tile exceeds a threshold. For each row, the sum of the other gradients is
known. Its product with the mean of the other head rows, one outer product, removes most of the
hidden gradient's error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lens_kernels.backends import compiled, matmul

# Active entries that are gathered at once on a CPU. All at once would exceed the caches, and need
# new memory, which the system clears first.
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

    ``grad`` ``(R, V)`` is a tile of gradients, ``weight`` ``(V, D)`` the head's, ``x`` ``(R, D)``
    the rows of the tile and ``head_grad`` ``(V, D)``, to which nothing was written unless
    ``begun``.
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
    """Approximate ``full_products`` by the entries ``columns`` and the sum of all others.

    ``weight_sum`` ``(D,)`` is the sum of the head's rows.
    """
    sums = weight_sum.dtype
    hidden = grad.new_zeros(x.shape, dtype=sums)
    rest = grad.sum(1, dtype=sums)  # of the gradients left out
    rest_weight = weight_sum.clone()  # of the head rows left out
    step = CPU_ACTIVE_TILE if grad.device.type == "cpu" else max(1, columns.shape[0])
    for part in columns.split(step):
        used = grad[:, part]  # index_select takes six times as long on strided rows
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
    """Return the largest, the sum and the sum of squares of every column's absolute values."""
    size = grad.abs()
    return size.amax(0), size.sum(0), size.square().sum(0)


class Survey:
    """Sizes of the entries of a tile of gradients: of every column, and of all."""

    peak: Tensor  # (V,), the largest absolute value of every column
    rows = 0

    def total(self) -> Tensor:
        """Return the sum of all absolute values."""
        raise NotImplementedError

    def squares_of_all(self) -> Tensor:
        """Return the sum of all squares."""
        raise NotImplementedError

    def left_out(self, grad: Tensor, active: Tensor) -> Tensor:
        """Return the sum of absolute values outside the columns ``active``."""
        raise NotImplementedError

    def active(self, threshold: float | Tensor, relative: bool) -> Tensor:
        """Return the columns with a gradient above the threshold, ``(n,)``.

        A ``relative`` threshold is a multiple of the root mean square of the tile. All that is left
        out is then, in the 2-norm, at most this part of the tile. On a GPU this waits for the
        device, since the number of columns decides shapes.
        """
        entries = self.rows * self.peak.shape[0]
        bound = threshold * (self.squares_of_all() / entries).sqrt() if relative else threshold
        # Written so that NaN counts as active. An infinite bound would leave out infinities too.
        return (~((self.peak <= bound) & (bound < math.inf))).nonzero()[:, 0]


class ColumnStatistics(Survey):
    """A survey by columns, of gradients that are read block by block."""

    def __init__(self, compile_sums: bool = False) -> None:
        self.compile_sums = compile_sums
        self.mass: Tensor  # (V,), the sum of absolute values of every column
        self.squares: Tensor  # (V,), the sum of squares of every column

    def add(self, grad: Tensor) -> None:
        """Add a block of rows ``(R, V)``."""
        peak, mass, squares = compiled.call(self.compile_sums, column_sums, grad)
        if self.rows:
            peak = torch.maximum(self.peak, peak)
            mass, squares = self.mass + mass, self.squares + squares
        self.peak, self.mass, self.squares = peak, mass, squares
        self.rows += grad.shape[0]

    def total(self) -> Tensor:
        """Return the sum of all absolute values."""
        return self.mass.sum()

    def squares_of_all(self) -> Tensor:
        """Return the sum of all squares."""
        return self.squares.sum()

    def left_out(self, grad: Tensor, active: Tensor) -> Tensor:
        """Return the sum of absolute values outside the columns ``active``."""
        return self.mass.index_fill(0, active, 0.0).sum()


class RowStatistics(Survey):
    """A survey by rows, which a kernel fills as it writes them. Of columns it has the peaks alone.

    Peaks are bits of float32 numbers. Those of positive numbers are in the order of the numbers,
    and the largest integer is the same in whatever order rows come.
    """

    def __init__(self, vocab_size: int, stride: int, device: torch.device) -> None:
        self.bits = torch.zeros(stride, dtype=torch.int32, device=device)
        self.peak = self.bits.view(torch.float32)[:vocab_size]
        self.mass: list[Tensor] = []
        self.squares: list[Tensor] = []

    def add(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what more rows fill: bits, and for each row the sums of sizes and of squares."""
        self.rows += rows
        for sums in (self.mass, self.squares):
            sums.append(self.peak.new_empty(rows))
        return self.bits, self.mass[-1], self.squares[-1]

    def total(self) -> Tensor:
        """Return the sum of all absolute values."""
        return torch.cat(self.mass).sum()

    def squares_of_all(self) -> Tensor:
        """Return the sum of all squares."""
        return torch.cat(self.squares).sum()

    def left_out(self, grad: Tensor, active: Tensor) -> Tensor:
        """Return the sum of absolute values outside the columns ``active``."""
        return (self.total() - grad[:, active].abs().sum(dtype=self.peak.dtype)).clamp(min=0)
