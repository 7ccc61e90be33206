"""The pass by a Triton kernel on a GPU, which writes gradients to a separate buffer.

``cluster_pass_kernel`` reads each logit once. It runs if a cluster of programs can hold a row of
logits, which ``clusters.py`` decides. Otherwise ``row_pass_kernel`` reads a row up to three times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lens_kernels.backends.head_products import RowStatistics
from lens_kernels.backends.torch import clusters
from lens_kernels.backends.torch.layout import apart, row_stride
from lens_kernels.backends.torch.passes import Terms
from lens_kernels.backends.triton.kernels.cluster_pass import cluster_pass_kernel
from lens_kernels.backends.triton.kernels.pointwise import name_of
from lens_kernels.backends.triton.kernels.row_pass import OPTIONS, row_pass_kernel
from lens_kernels.call import LossCall
from lens_kernels.lens import LensHead
from lens_kernels.options import RELATIVE_ENTROPIES


class RowKernelPass:
    """The pass by a row kernel, for the heads and options of one call."""

    def __init__(self, call: LossCall, factor: torch.dtype, tokens: int) -> None:
        self.call = call
        # Count masked tokens too, so that buffers have the same size for every mask.
        rows = call.row_weight.shape[1] * len(call.student_hidden)
        head = call.student_head.weight.dtype if "weight" in call.needing_grad() else None
        self.layout = apart(rows, call.vocab_size, factor, call.workspace_bytes, head)
        self.cluster, self.capped = clusters.for_call(call), clusters.has_cap(call)
        ours, theirs = call.temperatures
        self.student = self.model(call.student_head, ours)
        self.teacher = None if call.teacher_head is None else self.model(call.teacher_head, theirs)

    def model(self, head: LensHead, temperature: float) -> tuple[Any, ...]:
        """Return a head's bias, slope and softcap, as arguments of the kernel."""
        vocab_size, bias = self.call.vocab_size, head.bias
        if bias is not None:
            bias = F.pad(bias[:vocab_size].float(), (0, row_stride(vocab_size) - vocab_size))
        logits = head.logit_map(temperature)
        return bias, logits.slope, logits.cap

    def survey(self) -> RowStatistics:
        """Return empty statistics of logit gradients."""
        vocab_size = self.call.vocab_size
        return RowStatistics(vocab_size, row_stride(vocab_size), self.call.row_weight.device)

    def run(
        self, tiles: list[Tensor], terms: Terms, grad: Tensor | None, survey: Any
    ) -> list[Tensor]:
        """Launch the kernel, with one program or cluster for each row."""
        call, (zs, *zt) = self.call, tiles
        rows = zs.shape[0]

        def one() -> Tensor:
            return zs.new_empty(rows)

        losses: list[Tensor] = []
        student, teacher = (zs, *self.student), None
        weight = loss = labels = statistics = None
        if terms.divergence is not None:
            assert terms.weight is not None and self.teacher is not None
            teacher = (zt[0], *self.teacher)
            weight, loss = _aligned(terms.weight), one()
            losses.append(loss)
            # For relative entropies, the kernel's first sweep computes these statistics anyway.
            if terms.teacher_statistics is not None and terms.divergence not in RELATIVE_ENTROPIES:
                statistics = _aligned(terms.teacher_statistics)
        if terms.labels is not None:
            assert terms.label_weight is not None
            labels = _aligned(terms.labels), _aligned(terms.label_weight), one()
            losses.append(labels[-1])
        name = name_of(terms.divergence, call.beta)
        kernel, options = row_pass_kernel, OPTIONS
        if self.cluster is not None:
            heavy = self.capped or survey is not None or labels is not None
            plain = not heavy and name not in ("jsd", "jeffreys")
            kernel, options = cluster_pass_kernel, self.cluster.options(plain)
        # Triton launches kernels on the current device, which may differ from the device of the
        # tensors.
        with torch.cuda.device_of(zs):
            kernel[(rows,)](
                student, teacher, statistics, labels, weight, loss, grad,
                None if survey is None else survey.add(rows),
                zs.stride(0), 0 if grad is None else grad.stride(0), call.vocab_size,
                call.beta, 1.0 - call.beta,
                None if labels is None or call.temperature == 1.0 else call.temperature,
                DIVERGENCE=name, **options,
            )  # fmt: skip
        return losses


def _aligned(x: Tensor) -> Tensor:
    """Return a copy of a slice, because Triton would compile a kernel for each alignment."""
    return x.clone(memory_format=torch.contiguous_format)
