"""The pass by a Triton kernel on a GPU, which writes gradients to a separate buffer.

``cluster_pass_kernel`` reads each logit once. It runs if a cluster of programs can hold a row of
logits, which ``clusters.py`` decides. Otherwise, and for sparse targets and standardised logits,
``row_pass_kernel`` reads a row up to five times.
"""

from __future__ import annotations

import math
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
        columns = call.widest or call.vocab_size  # all ranks must have the same layout
        self.layout = apart(rows, columns, factor, call.workspace_bytes, head, bool(call.group))
        self.cluster, self.capped = clusters.for_call(call), clusters.has_cap(call)
        self.clip = call.token_clip if call.token_clip < math.inf else None
        self.biases = [self.bias(head) for head in (call.student_head, *call.teacher_heads)]

    def bias(self, head: LensHead) -> Tensor | None:
        """Return a head's bias with the padding of a row."""
        vocab_size, bias = self.call.vocab_size, head.bias
        if bias is None:
            return None
        return F.pad(bias[:vocab_size].float(), (0, row_stride(vocab_size) - vocab_size))

    def model(self, teacher: int | None, standardized: bool) -> tuple[Any, ...]:
        """Return a head's bias, slope and softcap, as arguments of the kernel.

        ``teacher`` is the index of the teacher's head, or None for the student's head.
        """
        call, at = self.call, 0 if teacher is None else teacher + 1
        head = (call.student_head, *call.teacher_heads)[at]
        logits = head.logit_map(1.0 if standardized else call.temperatures[at > 0])
        return self.biases[at], logits.slope, logits.cap

    def grad_stats(self) -> RowStatistics:
        """Return empty statistics of logit gradients."""
        vocab_size = self.call.vocab_size
        return RowStatistics(vocab_size, row_stride(vocab_size), self.call.row_weight.device)

    def run(
        self, tiles: list[Tensor], terms: Terms, grad: Tensor | None, grad_stats: Any
    ) -> list[Tensor]:
        """Launch the kernel, with one program or cluster for each row."""
        call, (zs, *zt) = self.call, tiles
        rows = zs.shape[0]

        def one() -> Tensor:
            return zs.new_empty(rows)

        losses: list[Tensor] = []
        own = terms.standardized
        student, teacher = (zs, *self.model(None, own)), None
        weight = loss = labels = statistics = targets = None
        divergence = terms.divergence
        if divergence is not None:
            assert terms.weight is not None
            weight, loss = aligned(terms.weight), one()
            losses.append(loss)
        if terms.targets is not None:
            divergence, sparse = None, terms.targets
            parts = sparse.ids, sparse.values, sparse.constant
            targets = (*map(aligned, parts), sparse.ids.shape[-1])
        elif divergence is not None:
            teacher = (zt[0], *self.model(terms.teacher, own))
            # For relative entropies, the kernel's first sweep computes the teacher's log-sum-exps
            # anyway.
            given = None if own else terms.teacher_statistics
            if given is not None and divergence not in RELATIVE_ENTROPIES:
                statistics = aligned(given)
        if terms.labels is not None:
            assert terms.label_weight is not None
            labels = aligned(terms.labels), aligned(terms.label_weight), one()
            losses.append(labels[-1])
        name = name_of(divergence, call.beta)
        further = {"targets": targets, "temperatures": call.temperatures if own else None}
        kernel, options = row_pass_kernel, {**OPTIONS, **further}
        if targets is None and not own and self.cluster is not None:
            wide = grad is not None and grad.dtype is torch.float32
            heavy = wide or self.capped or grad_stats is not None or labels is not None
            plain = not heavy and name not in ("jsd", "jeffreys")
            kernel, options = cluster_pass_kernel, self.cluster.options(plain)
        # Triton launches kernels on the current device, which may differ from the device of the
        # tensors.
        with torch.cuda.device_of(zs):
            kernel[(rows,)](
                student, teacher, statistics, labels, weight, loss, grad,
                None if grad_stats is None else grad_stats.add(rows),
                zs.stride(0), 0 if grad is None else grad.stride(0), call.vocab_size,
                call.beta, 1.0 - call.beta,
                None if labels is None or call.temperature == 1.0 else call.temperature,
                self.clip, DIVERGENCE=name, **options,
            )  # fmt: skip
        return losses


def aligned(x: Tensor) -> Tensor:
    """Return a copy of a slice, because Triton would compile a kernel for each alignment."""
    return x.clone(memory_format=torch.contiguous_format)
