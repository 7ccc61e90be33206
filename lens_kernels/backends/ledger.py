"""What every backend keeps of a call: which tokens count and by how much, losses and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lens_kernels.backends import head_products
from lens_kernels.backends.pages import in_huge_pages
from lens_kernels.call import Evaluation, LossCall


class Ledger:
    """Rows and gradients of one call, as they are summed up.

    Gradients are made for weights relative to the largest one and scaled once, at the end: a 1/N
    inside a 16-bit tile of gradients would flush most of it to zero.
    """

    def __init__(self, call: LossCall, compute: torch.dtype) -> None:
        self.threshold, self.relative = call.spec.grad_threshold, call.spec.threshold_is_relative
        device = call.row_weight.device
        tokens = call.row_weight.shape[1]
        self.index = None if call.mask is None else call.mask.nonzero()[:, 0]
        self.tokens = tokens if self.index is None else self.index.shape[0]
        self.rows = torch.zeros(call.row_weight.shape, dtype=compute, device=device)

        # Masked rows are left out: their weight may be anything, as the slope of a root at 0 is.
        counted = call.row_weight if self.index is None else call.row_weight[:, self.index]
        largest = counted.abs().amax() if self.tokens else counted.sum()
        self.largest = torch.where(largest > 0, largest, 1.0).to(compute)
        self.weight = call.row_weight.to(compute) / self.largest
        self.grads = {
            key: in_huge_pages(torch.empty(x.shape, dtype=compute, device=device)).zero_()
            for key, x in call.wanted().items()
        }
        # The tiles of gradients in absolute sum: all, and what was left out.
        self.mass = torch.zeros(2, dtype=compute, device=device)

    def wanted(self, pair: int, normed: bool) -> set[int | str]:
        """Return which gradients a pair contributes to."""
        before_head: set[int | str] = {pair} | ({"norm_weight", "norm_bias"} if normed else set())
        return self.grads.keys() & (before_head | {"weight", "bias"})

    def head_gradients(
        self,
        wanted: set[int | str],
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        columns: slice,
        weight_sum: Tensor | None = None,
        survey: head_products.Survey | None = None,
    ) -> Tensor | None:
        """Add what a tile gives to the head's gradients; return that of the rows, if wanted.

        ``grad`` ``(R, C)`` is the gradient of the products of the rows ``x`` ``(R, D)`` with the
        head's ``weight`` ``(C, D)``, its rows ``columns``. The sum of those and the survey of the
        tile may be known already.
        """
        if "bias" in wanted:
            self.grads["bias"][columns] += grad.sum(0, dtype=self.mass.dtype)
        head_grad = self.grads["weight"][columns] if "weight" in wanted else None
        products = weight, x, head_grad, bool(wanted - {"weight", "bias"})
        if self.threshold is None:
            hidden = head_products.whole(grad, *products)
        else:
            if weight_sum is None:
                weight_sum = weight.sum(0, dtype=self.mass.dtype)
            if survey is None:
                survey = head_products.Survey()
                survey.add(grad)
            used = survey.columns(self.threshold, self.relative)
            left_out = survey.mass.index_fill(0, used, 0.0)
            if used.shape[0] > head_products.WORTHWHILE * grad.shape[1]:
                left_out, hidden = left_out.zero_(), head_products.whole(grad, *products)
            else:
                hidden = head_products.active(grad, used, weight_sum, *products)
            self.mass += torch.stack([survey.mass.sum(), left_out.sum()])
        return None if hidden is None else hidden.to(self.mass.dtype)

    def result(self) -> Evaluation:
        """Return the rows, and the sums brought to scale."""
        grads = {key: grad.mul_(self.largest) for key, grad in self.grads.items()}
        everything, left_out = self.mass
        dropped = torch.where(everything > 0, left_out / everything, everything)
        return Evaluation(self.rows, grads, dropped)
