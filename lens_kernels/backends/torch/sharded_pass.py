"""The pass in torch if the head is sharded over ranks. Reductions combine the ranks' results.

Every rank has the same tokens, and its own vocabulary entries. Each tile needs three reductions
over ranks: the maxima of the logits, the sums of their exponentials, and the sums of each term,
such as the divergence's ``f`` and ``h``. ``over_ranks`` is their order, also for kernels.
Standardised logits first need their moments, which takes one gather.
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
    Entries,
    TorchPass,
    block_rows,
    compared_logits,
)
from lens_kernels.backends.torch.standardized import Moments, joined_moments, part_of_moments
from lens_kernels.backends.torch.targets import (
    Student,
    Sums,
    Target,
    gradient,
    loss_of,
    student_logits,
)
from lens_kernels.call import LossCall
from lens_kernels.divergence import FLOOR
from lens_kernels.sharding import Reduction


class Whole(NamedTuple):
    """Results of each row over the whole vocabulary of all ranks.

    ``statistics`` has an entry for each set of logits: the student's, the teacher's unless its
    statistics are given, and the student's of each target. An entry is the maximum of the logits
    and the log of their sum of exponentials, ``(R, 1)`` each. ``moments`` are those of student and
    teacher, if logits are standardised. ``sums`` ``(S, R)`` are those of ``local_sums``.
    """

    statistics: list[tuple[Tensor, Tensor]]
    moments: list[Moments]
    sums: Tensor | None = None


class Tile(NamedTuple):
    """The terms of a tile of logits.

    All ranks together hold ``vocab_size`` entries. With ``with_grad``, sums that only gradients
    need are computed too.
    """

    comparison: Comparison | None
    targets: list[Target]
    vocab_size: int
    with_grad: bool

    def sums(self, rows: Iterator[Tensor]) -> tuple[list[Tensor], list[Sums]]:
        """Return the sums of the comparison and of each target from those of ``local_sums``."""
        row = self.comparison
        number = 0 if row is None else 4 if row.standardized is not None and self.with_grad else 2
        compared = [next(rows) for _ in range(number)]
        return compared, [Sums.read(target, self.with_grad, rows) for target in self.targets]


def local_moments(zs: Tensor, tile: Tile) -> Tensor:
    """Describe this rank's part of the logits that are standardised, ``(M, 5, R)``."""
    if tile.comparison is None:
        logits = [tile.targets[0].student(zs)[0]]
    else:
        row = tile.comparison
        logits = [row.student(zs)[0], row.teacher(row.zt)[0]]
    return torch.stack([part_of_moments(u) for u in logits])


def local_statistics(zs: Tensor, tile: Tile, whole: Whole) -> tuple[Tensor, Tensor]:
    """Return maxima and sums of ``exp(z - maximum)`` of this rank's logits ``z``, ``(S, R)`` each.

    ``S`` counts the sets of logits in ``Whole.statistics``.
    """
    logits, ours = [], whole.moments[0] if whole.moments else None
    if tile.comparison is not None:
        (us, *_), ut = compared_logits(zs, tile.comparison, whole.moments or (None, None))
        logits += [us, ut] if tile.comparison.teacher_statistics is None else [us]
    logits += [student_logits(zs, target, ours)[0] for target in tile.targets]
    logits = [u.clamp(min=FLOOR) for u in logits]
    maxima = [u.amax(-1) for u in logits]
    sums = [(u - m[:, None]).exp().sum(-1) for u, m in zip(logits, maxima, strict=True)]
    return torch.stack(maxima), torch.stack(sums)


def local_sums(zs: Tensor, tile: Tile, whole: Whole) -> Tensor:
    """Return this rank's part of the sums of each term, ``(S, R)``.

    A comparison has those of ``f``, ``h`` and, for the gradient of standardised logits, ``h z'``
    and ``q z'``. Those of targets follow.
    """
    entries, students = _distributions(zs, tile, whole)
    sums: list[Tensor | None] = []
    if entries is not None:
        sums += [entries.f.sum(-1), entries.h.sum(-1)]
        if entries.standardized is not None and tile.with_grad:
            z = entries.standardized.z
            sums += [(entries.h * z).sum(-1), (entries.q * z).sum(-1)]
    for target, student in zip(tile.targets, students, strict=True):
        sums += Sums.of(target, student, tile.vocab_size, tile.with_grad)
    return torch.stack([x for x in sums if x is not None])


def write_gradient(zs: Tensor, tile: Tile, whole: Whole) -> list[Tensor]:
    """Overwrite ``zs`` with the gradient of the weighted losses, except for a part at ``ids``.

    The gradients at the ``ids`` of targets are returned, and the caller adds them.
    """
    assert whole.sums is not None
    entries, students = _distributions(zs, tile, whole)
    compared, targets = tile.sums(iter(whole.sums))
    grads, at_ids = [], []
    if entries is not None and tile.comparison is not None:
        loss, h_sum, *products = compared
        product = None
        if products:  # sum_v G_v z'_v with G = h - q sum(h)
            product = (products[0] - h_sum * products[1])[:, None]
        of_row = tile.comparison, loss, h_sum[:, None], tile.vocab_size, product
        grads.append(entries.gradient(*of_row))
    for target, student, sums in zip(tile.targets, students, targets, strict=True):
        loss = loss_of(target, sums, student.lse)
        grad, part = gradient(target, student, sums, loss, tile.vocab_size)
        grads.append(grad)
        at_ids.append(part)
    zs.copy_(sum(grads[1:], grads[0]))
    return at_ids


def _distributions(zs: Tensor, tile: Tile, whole: Whole) -> tuple[Entries | None, list[Student]]:
    ours = whole.moments[0] if whole.moments else None
    statistics, entries = [*whole.statistics], None
    if (row := tile.comparison) is not None:
        student, teacher = statistics.pop(0), row.teacher_statistics
        known = statistics.pop(0) if teacher is None else teacher.split(1, -1)
        entries = Entries.of(zs, row, student, known, whole.moments or (None, None))
    students = [
        Student.of(zs, target, each, ours)
        for target, each in zip(tile.targets, statistics, strict=True)
    ]
    return entries, students


def of_rank(target: Target, columns: int) -> Target:
    """Return a target without the ``values`` of ids outside this rank's ``columns`` entries."""
    own = (target.ids >= 0) & (target.ids < columns)
    values = target.weight.new_ones(()) if target.values is None else target.values
    return target._replace(
        ids=target.ids.clamp(0, columns - 1),
        values=torch.where(own, values, 0.0),
        total=values.expand(target.ids.shape).sum(-1, keepdim=True),
    )


class ShardedPass(TorchPass):
    """The pass over the vocabulary entries of this rank."""

    def __init__(self, call: LossCall, factor: torch.dtype, tokens: int) -> None:
        super().__init__(call, factor, tokens)
        self.reduce = Reduction(call.group)

    def run(
        self, tiles: list[Tensor], terms: Terms, grad: Tensor | None, grad_stats: Any
    ) -> list[Tensor]:
        """Run each part of the pass over a tile, then combine the results of all ranks."""
        step = block_rows(self.device, self.compiled, *tiles[0].shape)
        blocks = [slice(at, at + step) for at in range(0, tiles[0].shape[0], step)]

        def tile_of(block: slice) -> tuple[Tensor, Tile]:
            zs, comparison, targets = self.arguments(tiles, terms, block)
            targets = [of_rank(target, zs.shape[-1]) for target in targets]
            return zs, Tile(comparison, targets, self.call.whole_size, grad is not None)

        def each(function: Callable[..., Any], *whole: Whole) -> Iterator[Any]:
            for block in blocks:
                known = [_part(x, block) for x in whole]
                yield compiled.call(self.compiled, function, *tile_of(block), *known)

        moments = []
        if terms.standardized and terms.divergence is not None:
            parts = self.reduce.gather(torch.cat([*each(local_moments)], -1))
            moments = [joined_moments(x) for x in parts.unbind(1)]

        def statistics() -> tuple[Tensor, Tensor]:
            maxima, sums = zip(*each(local_statistics, Whole([], moments)), strict=True)
            return torch.cat(maxima, 1), torch.cat(sums, 1)

        def sums(whole: Whole) -> Tensor:
            return torch.cat([*each(local_sums, whole._replace(moments=moments))], 1)

        def write(whole: Whole) -> None:
            parts = each(write_gradient, whole._replace(moments=moments))
            for block, at_ids in zip(blocks, parts, strict=True):
                zs, tile = tile_of(block)
                for target, part in zip(tile.targets, at_ids, strict=True):
                    zs.scatter_add_(-1, target.ids, part)
                if grad_stats is not None:
                    grad_stats.add(zs)  # zs now holds the gradient

        whole = over_ranks(self.reduce, statistics, sums, None if grad is None else write)
        return self.losses(tile_of(slice(None))[1], whole)

    def losses(self, tile: Tile, whole: Whole) -> list[Tensor]:
        """Return the losses of each row from the sums over all ranks."""
        assert whole.sums is not None
        compared, targets = tile.sums(iter(whole.sums))
        losses = [(compared[0], self.clip)] if compared else []
        statistics = whole.statistics[len(whole.statistics) - len(targets) :]
        for target, sums, (maximum, log_sum) in zip(tile.targets, targets, statistics, strict=True):
            losses.append((loss_of(target, sums, maximum + log_sum), target.clip))
        return [x if clip is None else x.clamp(max=clip) for x, clip in losses]


def over_ranks(
    reduce: Reduction,
    statistics: Callable[[], tuple[Tensor, Tensor]],
    sums: Callable[[Whole], Tensor],
    write: Callable[[Whole], None] | None,
    factors: Tensor | float = 1.0,
) -> Whole:
    """Run the parts of the pass over a tile, and return the results over all ranks.

    ``statistics`` returns maxima and sums of exponentials of this rank's logits, ``(S, R)`` each.
    The logits are ``factors`` times the values whose maxima it returns. ``sums`` returns this
    rank's part of the sums of each term. ``write`` writes gradients.
    """
    maxima, totals = statistics()
    highest = reduce.maximum(maxima.clone())
    totals = reduce.sum(totals * ((maxima - highest) * factors).exp())
    whole = Whole([*zip(highest[..., None], totals.log()[..., None], strict=True)], [])
    whole = whole._replace(sums=reduce.sum(sums(whole)))
    if write is not None:
        write(whole)
    return whole


def _part(whole: Whole, block: slice) -> Whole:
    return Whole(
        [(maximum[block], log_sum[block]) for maximum, log_sum in whole.statistics],
        [Moments(*(x[block] for x in moments)) for moments in whole.moments],
        None if whole.sums is None else whole.sums[:, block],
    )
