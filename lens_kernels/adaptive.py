"""Computes the forward KL's weight in the adaptive KL (Wu et al. 2024, arXiv 2404.02657).

The adaptive KL of a token is a weighted mean of its forward KL and reverse KL. The docstring of
``distillation_loss`` defines the weight, which gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lens_kernels import sharded_share
from lens_kernels.backends import matmul
from lens_kernels.call import SCHEMA, LossCall, Packed
from lens_kernels.lens import LensHead
from lens_kernels.sharding import Reduction

# The head of the vocabulary is the teacher's most probable entries. Their probabilities sum to at
# most one half.
MASS = 0.5
# The peak memory of the adaptive KL's weight, as a multiple of one model's logits. A search among
# all entries needs the most: 8 on a CPU, and on a GPU temporary memory for indices of 8 bytes each.
TILES = 10
# The search for a head begins with this share of a row's entries, and with at least this number.
SHARE, LEAST = 1 / 256, 32
# If the head is larger, the next search takes this many times as many entries.
GROWTH = 8


def head_share(call: LossCall) -> Tensor:
    """Return each token's weight of the forward KL, for the last lens pair, ``(N,)``; masked: 0."""
    with torch.no_grad():
        return _head_share(*call.pack())


# torch.compile cannot trace a tensor whose size depends on the values of a mask. A custom operator
# hides that size from it.
@torch.library.custom_op(
    "lens_kernels::head_share", mutates_args=(), schema=f"({SCHEMA}) -> Tensor"
)
def _head_share(*packed: Any) -> Tensor:
    call = Packed(*packed).unpack()
    ours, theirs = call.temperatures
    teacher_head = call.teacher_heads[call.teacher_index(-1)]
    models = (
        (call.teacher_hidden[-1], _logits(teacher_head, call, theirs)),
        (call.student_hidden[-1], _logits(call.student_head, call, ours)),
    )
    share = call.row_weight.new_zeros(call.row_weight.shape[-1], dtype=call.compute_dtype)
    every = torch.arange(share.shape[0], device=share.device)
    kept = every if call.mask is None else every[call.mask]
    reduce = Reduction(call.group) if call.group else None
    columns = call.widest or call.vocab_size  # all ranks must run the same number of steps
    step = call.workspace_bytes // (TILES * columns * call.compute_dtype.itemsize)
    for rows in kept.split(max(1, step)):
        logits = (logits(hidden[rows]) for hidden, logits in models)
        share[rows] = share_of(_probabilities(logits, reduce), reduce)
    return share


@_head_share.register_fake
def _(*packed: Any) -> Tensor:
    call = Packed(*packed).unpack()
    return call.row_weight.new_empty(call.row_weight.shape[-1], dtype=call.compute_dtype)


def _logits(head: LensHead, call: LossCall, temperature: float) -> Callable[[Tensor], Tensor]:
    """Return a function from final hidden states to logits ``(R, V)``, rounded as in backends."""
    head = head.prefix(call.vocab_size)
    factors = matmul.Factors(head.weight, call.operand_dtype, call.compute_dtype)

    def logits(hidden: Tensor) -> Tensor:
        z = hidden.new_empty(hidden.shape[0], call.vocab_size, dtype=call.compute_dtype)
        matmul.project(factors.rows(hidden), factors.weight, z)
        return head.logits(z, temperature)[0]

    return logits


def _probabilities(logits: Iterator[Tensor], reduce: Reduction | None) -> tuple[Tensor, ...]:
    if reduce is None:
        return tuple(z.softmax(-1) for z in logits)
    return sharded_share.softmax([*logits], reduce)


def share_of(probabilities: tuple[Tensor, ...], reduce: Reduction | None) -> Tensor:
    """Return each row's weight of the forward KL, ``(R,)``, from ``p`` and ``q``, ``(R, V)``.

    With ``reduce``, ``p`` and ``q`` hold this rank's part of the vocabulary.
    """
    p, q = probabilities
    of_head = _head(p) if reduce is None else sharded_share.head(p, MASS, reduce)
    gap = (p - q).abs()
    sums = torch.stack([gap.where(of_head, 0).sum(-1), gap.where(~of_head, 0).sum(-1)])
    head, tail = sums if reduce is None else reduce.sum(sums)
    return torch.where(head + tail > 0, head / (head + tail), 0.5)


def _head(p: Tensor) -> Tensor:
    """Return which entries belong to the head.

    A search among the largest entries of each row is much cheaper than a sort. Rows with larger
    heads are searched again, among more entries.
    """
    least, ties = p.new_empty(p.shape[0], 1), p.new_empty(p.shape[0], 1, dtype=torch.int64)
    rows = torch.arange(p.shape[0], device=p.device)
    candidates = max(LEAST, round(SHARE * p.shape[1]))
    while len(rows):
        candidates = min(candidates, p.shape[1])
        largest = p[rows].topk(candidates).values
        inside = largest.cumsum(-1) <= MASS
        inside[:, 0] = True
        size = inside.sum(-1, keepdim=True)
        smallest = largest.gather(-1, size - 1)
        least[rows] = smallest
        ties[rows] = size - (largest > smallest).sum(-1, keepdim=True)
        # Where all candidates are in the head, more entries may be.
        rows = rows[(size[:, 0] == candidates) & (candidates < p.shape[1])]
        candidates *= GROWTH
    return sharded_share.not_less(p, least, ties)
