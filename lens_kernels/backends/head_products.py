"""The two products that turn a tile of logit gradients into those of hidden rows and head.

``Whole`` uses every entry. ``Active`` is the opt-in approximation: trained models put almost no
gradient on almost all of the vocabulary, so for a chunk of rows the entries with any |G| above a
threshold are gathered, and both products are made over them alone. The sum of what is left out is
known for every row; given to the mean of the head rows left out, it mends most of the hidden
gradient's error at the price of one outer product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens_kernels.backends import matmul


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


class Survey:
    """The largest absolute gradient of every entry, and the absolute sum of all, block by block."""

    def __init__(self) -> None:
        self.peak: Tensor | None = None
        self.mass: Tensor | float = 0.0

    def add(self, grad: Tensor) -> None:
        """Survey a block of rows ``(R, V)``."""
        size = grad.abs()
        peak = size.amax(0)
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self.mass = self.mass + size.sum(dtype=torch.promote_types(size.dtype, torch.float32))


def active(
    grad: Tensor,
    weight: Tensor,
    weight_sum: Tensor,
    survey: Survey,
    threshold: float,
    dtype: torch.dtype,
) -> tuple[Active, Tensor]:
    """Return the columns of ``grad`` with an entry above the threshold, and ``[mass, mass used]``.

    ``weight_sum`` is the sum of the head's rows, mass a sum of absolute values, and ``dtype`` that
    of the factors. On a GPU this waits for the device, since the number of columns decides the
    shapes.
    """
    assert survey.peak is not None
    # Not "above": a NaN is to be seen.
    columns = (~(survey.peak <= threshold)).nonzero()[:, 0]
    used, used_weight = grad.index_select(1, columns), weight.index_select(0, columns)
    left_out = max(1, grad.shape[1] - columns.shape[0])
    part = Active(
        columns,
        used.to(dtype),
        used_weight,
        rest=grad.sum(1, dtype=weight_sum.dtype) - used.sum(1, dtype=weight_sum.dtype),
        rest_weight=(weight_sum - used_weight.sum(0, dtype=weight_sum.dtype)) / left_out,
    )
    # Summed as the survey does, so that what is used of all is all, to the last digits.
    mass_used = used.abs().sum(dtype=weight_sum.dtype)
    return part, torch.stack([torch.as_tensor(survey.mass, device=grad.device), mass_used])
