"""The pass in torch if the head is sharded over ranks. Reductions combine the ranks' results.

Every rank has the same tokens, and its own vocabulary entries. Each tile needs three reductions
over ranks: the maxima of the logits, the sums of their exponentials, and the sums of the
divergence's ``f`` and ``h``. ``over_ranks`` is their order, also for kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens_kernels.backends import compiled
from lens_kernels.backends.torch.passes import Terms
from lens_kernels.backends.torch.pointwise_pass import (
    Comparison,
    TorchPass,
    block_rows,
)
from lens_kernels.backends.torch.targets import Target
from lens_kernels.call import LossCall
from lens_kernels.divergence import FLOOR
from lens_kernels.sharding import Reduction


class Whole(NamedTuple):
    """Results of each row over the whole vocabulary of all ranks, ``(R, 1)``.

    ``statistics`` has up to three entries: for the student's logits, for the teacher's, and for the
    student's at temperature 1. An entry is the maximum of the logits and the log of their sum of
    exponentials.
    """

    statistics: list[tuple[Tensor, Tensor]]
    h_sum: Tensor | None = None


def local_statistics(
    zs: Tensor, comparison: Comparison | None, labels: Target | None
) -> tuple[Tensor, Tensor]:
    """Return maxima and sums of ``exp(z - maximum)`` of this rank's logits ``z``, ``(S, R)`` each.

    ``S`` counts the kinds of logits: the student's, the teacher's, and the student's at temperature
    1.
    """
    logits = []
    if comparison is not None:
        logits.append(comparison.student(zs)[0])
        if comparison.teacher_statistics is None:
            logits.append(comparison.teacher(comparison.zt)[0])
    if labels is not None:
        logits.append(labels.student(zs)[0])
    logits = [u.clamp(min=FLOOR) for u in logits]
    maxima = [u.amax(-1) for u in logits]
    sums = [(u - m[:, None]).exp().sum(-1) for u, m in zip(logits, maxima, strict=True)]
    return torch.stack(maxima), torch.stack(sums)


def local_sums(
    zs: Tensor, comparison: Comparison | None, labels: Target | None, whole: Whole
) -> Tensor:
    """Return this rank's part of the sums of ``f``, of ``h``, and of the cross entropy, ``(S, R)``.

    A row's cross entropy is 0 unless this rank has the entry of its label.
    """
    sums = []
    if comparison is not None:
        _, f, h, _ = _entries(zs, comparison, whole)
        sums += [f.sum(-1), h.sum(-1)]
    if labels is not None:
        lq, _ = _log_softmax(labels.student(zs)[0], whole.statistics[-1])
        own = (labels.ids >= 0) & (labels.ids < zs.shape[-1])
        column = labels.ids.clamp(0, zs.shape[-1] - 1)
        sums.append(torch.where(own, -lq.gather(-1, column), 0.0)[:, 0])
    return torch.stack(sums)


def write_gradient(
    zs: Tensor, comparison: Comparison | None, labels: Target | None, whole: Whole
) -> None:
    """Overwrite ``zs`` with the gradient of the weighted losses."""
    grads = []
    if comparison is not None:
        assert whole.h_sum is not None
        q, _, h, slope = _entries(zs, comparison, whole)
        grads.append((h - q * whole.h_sum) * (comparison.weight[:, None] * slope))
    if labels is not None:
        logits, slope = labels.student(zs)
        _, q = _log_softmax(logits, whole.statistics[-1])
        columns = torch.arange(zs.shape[-1], device=zs.device)
        residual = q - (columns == labels.ids).to(q.dtype)
        grads.append(residual * (labels.weight[:, None] * slope))
    zs.copy_(sum(grads[1:], grads[0]))


def _entries(
    zs: Tensor, row: Comparison, whole: Whole
) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    us, slope = row.student(zs)
    lq, q = _log_softmax(us, whole.statistics[0])
    if row.teacher_statistics is None:
        statistics = whole.statistics[1]
    else:
        maximum, log_sum = row.teacher_statistics.split(1, -1)
        statistics = (maximum, log_sum)
    lp, p = _log_softmax(row.teacher(row.zt)[0], statistics)
    return q, *row.formula(lp, lq, p, q, row.beta), slope


def _log_softmax(u: Tensor, statistics: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    maximum, log_sum = statistics
    log = (u.clamp(min=FLOOR) - maximum) - log_sum
    return log, log.exp()


class ShardedPass(TorchPass):
    """The pass over the vocabulary entries of this rank."""

    def __init__(self, call: LossCall, factor: torch.dtype, tokens: int) -> None:
        super().__init__(call, factor, tokens)
        self.reduce = Reduction(call.group)

    def run(
        self, tiles: list[Tensor], terms: Terms, grad: Tensor | None, survey: Any
    ) -> list[Tensor]:
        """Run each part of the pass over a tile, then combine the results of all ranks."""
        step = block_rows(self.device, self.compiled, *tiles[0].shape)
        blocks = [slice(at, at + step) for at in range(0, tiles[0].shape[0], step)]

        def each(function: Callable[..., Any], whole: Whole | None = None) -> Iterator[Any]:
            for block in blocks:
                zs, comparison, targets = self.arguments(tiles, terms, block)
                labels = targets[0] if targets else None
                known = () if whole is None else (_part(whole, block),)
                yield compiled.call(self.compiled, function, zs, comparison, labels, *known)

        def statistics() -> tuple[Tensor, Tensor]:
            maxima, sums = zip(*each(local_statistics), strict=True)
            return torch.cat(maxima, 1), torch.cat(sums, 1)

        def gradient(whole: Whole) -> None:
            for block, _ in zip(blocks, each(write_gradient, whole), strict=True):
                if survey is not None:
                    survey.add(tiles[0][block].data)

        return over_ranks(
            self.reduce, statistics, lambda whole: torch.cat([*each(local_sums, whole)], 1),
            None if grad is None else gradient, has_h=terms.divergence is not None,
        )  # fmt: skip


def over_ranks(
    reduce: Reduction,
    statistics: Callable[[], tuple[Tensor, Tensor]],
    sums: Callable[[Whole], Tensor],
    gradient: Callable[[Whole], None] | None,
    has_h: bool,
    factors: Tensor | float = 1.0,
) -> list[Tensor]:
    """Run the parts of the pass over a tile, and return the losses of its rows.

    ``statistics`` returns maxima and sums of exponentials of this rank's logits, ``(S, R)`` each.
    The logits are ``factors`` times the values whose maxima it returns. ``sums`` returns this
    rank's part of the sums of ``f``, of ``h`` if ``has_h``, and of the cross entropy. ``gradient``
    writes gradients.
    """
    maxima, totals = statistics()
    highest = reduce.maximum(maxima.clone())
    totals = reduce.sum(totals * ((maxima - highest) * factors).exp())
    whole = Whole([*zip(highest[..., None], totals.log()[..., None], strict=True)])
    losses = [*reduce.sum(sums(whole))]
    if has_h:
        whole = whole._replace(h_sum=losses.pop(1)[:, None])
    if gradient is not None:
        gradient(whole)
    return losses


def _part(whole: Whole, block: slice) -> Whole:
    statistics = [(maximum[block], log_sum[block]) for maximum, log_sum in whole.statistics]
    return Whole(statistics, None if whole.h_sum is None else whole.h_sum[block])
