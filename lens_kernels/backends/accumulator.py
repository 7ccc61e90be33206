"""Collects the losses of a call and the sums of its gradients, for every backend."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from lens_kernels.backends import head_products
from lens_kernels.backends.head_products import ColumnStatistics, GradientStatistics
from lens_kernels.backends.pages import in_huge_pages
from lens_kernels.call import LossCall, LossResult
from lens_kernels.options import Divergence
from lens_kernels.sharding import Reduction

# Divergences whose logit gradients have no upper bound, because they grow with the log-ratio of the
# two probabilities. The logit gradients of the z-loss have no bound either.
UNBOUNDED = (Divergence.REVERSE_KL, Divergence.JEFFREYS)


def headroom(call: LossCall, dtype: torch.dtype) -> float:
    """Return the power of two by which float16 logit gradients are multiplied against underflow.

    Most logit gradients are below 6e-5, the smallest normal number of float16. They are at most 1,
    except for the divergences in ``UNBOUNDED``. The factor of these divergences is smaller, so that
    log-ratios up to about 500 do not overflow.
    """
    if dtype is not torch.float16:
        return 1.0
    unbounded = set(call.divergences) & set(UNBOUNDED) or call.z_loss
    return 2.0**7 if unbounded else 2.0**14


class Accumulator:
    """The losses of each row and the gradients of one call.

    A weight of 1/N would round most float16 logit gradients to zero. So logit gradients are divided
    by a unit, and the finished sums are multiplied by it. The unit is a power of two: about the
    largest possible logit gradient, divided by ``headroom``. A numeric ``grad_threshold`` is
    relative to the largest weight of a token.
    """

    def __init__(self, call: LossCall, grad_dtype: torch.dtype) -> None:
        compute, device = call.compute_dtype, call.row_weight.device
        tokens = call.row_weight.shape[1]
        self.index = None if call.mask is None else call.mask.nonzero()[:, 0]
        self.tokens = tokens if self.index is None else self.index.shape[0]
        self.rows = torch.zeros(call.row_weight.shape, dtype=compute, device=device)

        self.weight = call.row_weight.to(compute)
        self.unit: Tensor | None = None
        self.relative_threshold = call.threshold_is_relative
        self.threshold: float | Tensor | None = call.grad_threshold
        if grad_dtype is torch.float16 or self.threshold is not None:
            self.set_unit(call, headroom(call, grad_dtype))
        self.grads = {
            key: in_huge_pages(torch.empty(x.shape, dtype=compute, device=device))
            for key, x in call.needing_grad().items()
        }
        # Without a threshold, the first GEMM overwrites the head's gradient, so zeros are not
        # needed. With a threshold, the GEMMs only add to some of its rows.
        set_rows = call.vocab_size if self.tokens and self.threshold is None else 0
        for key, grad in self.grads.items():
            (grad[set_rows:] if key == "weight" else grad).zero_()
        # The number of rows of the head's gradient that are initialised.
        self.begun = call.vocab_size - set_rows
        # Two sums of absolute logit gradients: over all entries, and over the entries that the
        # threshold skipped.
        self.mass = torch.zeros(2, dtype=compute, device=device)
        # With a process group, each rank adds up hidden gradients over its own vocabulary entries.
        # The sum over ranks is the full gradient.
        self.reduce = Reduction(call.group) if call.group else None
        self.unfinished: list[Any] = []

    def set_unit(self, call: LossCall, scale: float) -> None:
        """Choose the unit of float16 gradients, and divide the weights of all rows by it."""
        # Leave out masked rows: their weights may be infinite or NaN.
        counted = call.row_weight if self.index is None else call.row_weight[:, self.index]
        largest = counted.sum()
        if self.tokens:
            # The first rows of ``counted`` are the weights of the divergences. With labels, one
            # more row has the weights of the cross entropy, which ignores the temperature.
            slopes = [1.0 / call.temperature] * len(call.divergences)
            slopes += [] if call.labels is None else [1.0]
            sizes = [slope * row.abs().amax() for slope, row in zip(slopes, counted, strict=False)]
            largest = torch.stack(sizes).amax() * call.student_head.scale
        largest = torch.where(largest > 0, largest, 1.0).to(self.weight.dtype)
        mantissa = torch.frexp(largest).mantissa
        # Dividing by a power of two does not round.
        self.unit = largest / mantissa / scale
        self.weight = self.weight / self.unit
        if self.threshold is not None and not self.relative_threshold:
            self.threshold = self.threshold * scale * mantissa

    def targets(self, pair: int, normed: bool) -> Set[int | str]:
        """Return the names of the gradients to which a lens pair contributes."""
        before_head: set[int | str] = {pair} | ({"norm_weight", "norm_bias"} if normed else set())
        return self.grads.keys() & (before_head | {"weight", "bias"})

    def add_head_gradients(
        self,
        targets: Set[int | str],
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        columns: slice,
        weight_sum: Tensor | None = None,
        grad_stats: GradientStatistics | None = None,
    ) -> Tensor | None:
        """Add a tile's part to the head's gradients, and return the gradient of the hidden rows.

        The result is None if neither hidden states nor norm need a gradient. ``grad`` ``(R, C)`` is
        the gradient with respect to ``x @ weight.T``. ``x`` ``(R, D)`` holds rows of hidden states,
        and ``weight`` ``(C, D)`` the rows ``columns`` of the head. Calls must come in ascending
        order of ``columns``. ``weight_sum`` is the sum of the rows of ``weight``. A missing
        ``weight_sum`` or ``grad_stats`` is computed here.
        """
        if "bias" in targets:
            self.grads["bias"][columns] += grad.sum(0, dtype=self.mass.dtype)
        head_grad = self.grads["weight"][columns] if "weight" in targets else None
        need_hidden = bool(targets - {"weight", "bias"})
        begun, self.begun = columns.stop <= self.begun, max(self.begun, columns.stop)
        factors = weight, x, head_grad, need_hidden
        if self.threshold is None:
            hidden = head_products.full_products(grad, *factors, begun)
        else:
            if weight_sum is None:
                weight_sum = weight.sum(0, dtype=self.mass.dtype)
            if grad_stats is None:
                grad_stats = ColumnStatistics()
                grad_stats.add(grad)
            active = grad_stats.active(self.threshold, self.relative_threshold)
            if active.shape[0] > head_products.MAX_ACTIVE_SHARE * grad.shape[1]:
                left_out = torch.zeros_like(self.mass[0])
                hidden = head_products.full_products(grad, *factors)
            else:
                left_out = grad_stats.left_out(grad, active)
                hidden = head_products.active_products(grad, active, weight_sum, *factors)
            self.mass += torch.stack([grad_stats.total(), left_out])
        return None if hidden is None else hidden.to(self.mass.dtype)

    def finish(self, *keys: int | str) -> None:
        """With a process group, start to sum the gradients ``keys`` over ranks, without waiting."""
        if self.reduce is not None:
            done = [self.grads[key] for key in keys if key in self.grads]
            self.unfinished += [self.reduce.begin_sum(x) for x in done]

    def result(self) -> LossResult:
        """Return the losses of all rows and the finished gradients."""
        grads = self.grads
        self.finish("norm_weight", "norm_bias")
        if self.reduce is not None and self.threshold is not None:
            self.reduce.sum(self.mass)
        for work in self.unfinished:
            assert self.reduce is not None
            with self.reduce.explained():
                work.wait()
        if self.unit is not None:
            grads = {key: grad.mul_(self.unit) for key, grad in grads.items()}
        everything, left_out = self.mass
        dropped = torch.where(everything > 0, left_out / everything, everything)
        return LossResult(self.rows, grads, dropped)
