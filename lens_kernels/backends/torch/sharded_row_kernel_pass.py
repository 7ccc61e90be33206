"""The pass by Triton kernels on a GPU for a vocabulary that is spread over ranks.

The kernels compute the parts of ``over_ranks``. They write gradients to a buffer of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens_kernels.backends.torch.passes import Terms
from lens_kernels.backends.torch.row_kernel_pass import RowKernelPass, aligned
from lens_kernels.backends.torch.sharded_pass import Whole, over_ranks
from lens_kernels.backends.triton.kernels.pointwise import name_of
from lens_kernels.backends.triton.kernels.row_pass import OPTIONS
from lens_kernels.backends.triton.kernels.split_row_pass import (
    gradient_kernel,
    statistics_kernel,
    sums_kernel,
)
from lens_kernels.call import LossCall
from lens_kernels.sharding import Reduction


class ShardedRowKernelPass(RowKernelPass):
    """The pass of a call over this rank's vocabulary entries."""

    def __init__(self, call: LossCall, factor: torch.dtype, tokens: int) -> None:
        super().__init__(call, factor, tokens)
        self.reduce = Reduction(call.group)

    def run(
        self, tiles: list[Tensor], terms: Terms, grad: Tensor | None, grad_stats: Any
    ) -> list[Tensor]:
        """Launch one kernel for each part of the pass, with one program for each row."""
        call, (zs, *zt) = self.call, tiles
        grid = (zs.shape[0],)
        student, teacher, weight = (zs, *self.model(None, False)), None, None
        labels = label_weight = temperature = None
        factors = []  # of the sets of logits
        # The teacher's statistics are computed even if they are given. This costs one read of its
        # logits, and saves a second form of the kernels.
        if terms.divergence is not None:
            assert terms.weight is not None
            teacher, weight = (zt[0], *self.model(terms.teacher, False)), aligned(terms.weight)
            factors += [_factor(student), _factor(teacher)]
        if terms.labels is not None:
            assert terms.label_weight is not None
            labels, label_weight = aligned(terms.labels), aligned(terms.label_weight)
            temperature = call.temperature
            factors.append(_factor(student) * temperature)
        numbers = call.vocab_size, call.beta, 1.0 - call.beta, temperature
        options = {"DIVERGENCE": name_of(terms.divergence, call.beta), **OPTIONS}

        def statistics() -> tuple[Tensor, Tensor]:
            out = zs.new_empty(len(factors), 2, *grid)
            statistics_kernel[grid](
                student, teacher, out, zs.stride(0), call.vocab_size, temperature, **OPTIONS
            )
            maxima, sums = out.unbind(1)
            return maxima, sums

        def sums(whole: Whole) -> Tensor:
            out = zs.new_empty(len(factors), *grid)
            sums_kernel[grid](
                student, teacher, _joined(whole), labels, out, zs.stride(0), *numbers, **options
            )
            return out

        def gradient(whole: Whole) -> None:
            assert grad is not None and whole.sums is not None
            h_sum = None if terms.divergence is None else whole.sums[1][:, None]
            gradient_kernel[grid](
                student, teacher, _joined(whole),
                None if labels is None else (labels, label_weight), h_sum, weight, grad,
                None if grad_stats is None else grad_stats.add(*grid),
                zs.stride(0), grad.stride(0), *numbers, **options,
            )  # fmt: skip

        # Triton launches kernels on the current device, which may not be the device of the tensors.
        with torch.cuda.device_of(zs):
            whole = over_ranks(
                self.reduce, statistics, sums, None if grad is None else gradient,
                zs.new_tensor(factors)[:, None],
            )  # fmt: skip
        assert whole.sums is not None
        losses = [*whole.sums]
        return losses if terms.divergence is None else [losses[0], *losses[2:]]


def _factor(model: tuple[Any, ...]) -> float:
    """Return the factor that turns ``y`` of the kernels into a logit."""
    _, _, slope, cap = model
    return float(slope if cap is None else cap)


def _joined(whole: Whole) -> Tensor:
    """Return maxima and logs of sums of all sets, ``(S, R, 2)``."""
    return torch.stack([torch.cat(pair, -1) for pair in whole.statistics])
