"""The pointwise pass over a tile of logits: statistics, losses, and the gradient in place."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lens_kernels.divergence import FLOOR, Formula, Mixture
from lens_kernels.lens import LogitMap

# A call over at least this many pairs of logits compiles the pass on a CPU. Measured on 2 cores:
# once per process compiling takes 6 to 10 s, 24 if Inductor's cache on disk lacks the code, and it
# then saves 10 to 15 ms per million pairs: in a run of 120 such steps as much as it took. On other
# devices the eager pass is bound by memory traffic, several times that of the compiled one, and the
# pass is always compiled.
CPU_COMPILE_LOGITS = 1 << 23
# Logits of one eager or compiled step on a CPU, so that its temporaries, or its tiles, stay in
# cache.
CPU_EAGER_BLOCK = 1 << 17
CPU_COMPILED_BLOCK = 1 << 20


def softmax(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of softmax and softmax itself, for one exponential.

    The normaliser is kept in two parts, maximum and log of sum: one fp32 number near 60 would put
    an error of 4e-6 into every probability. Both results are normalised by the same rounded log,
    since divergences are of second order in an error that log q and q share.
    """
    u = u - u.amax(-1, keepdim=True)
    powers = u.exp()
    log_total = powers.sum(-1, keepdim=True).log()
    return u - log_total, powers * (-log_total).exp()


class Comparison(NamedTuple):
    """A divergence from the teacher's products ``zt`` ``(R, V)``, and the weight of each row.

    ``formula`` is a function and not a name: torch keeps compiled code for each function, but torch
    2.13 does not guard on an ``Enum`` that picks an entry of a table, and would run the first
    divergence for all. Numbers are 0-dim tensors: of a float torch 2.13 makes a double, which the
    loops of a CPU would convert for every eight logits, a sixth of their time.
    """

    zt: Tensor
    weight: Tensor
    student: LogitMap
    teacher: LogitMap
    formula: Formula
    beta: Mixture


class Labels(NamedTuple):
    """The cross entropy of labels ``(R,)``, to which the temperature does not apply."""

    labels: Tensor
    weight: Tensor
    student: LogitMap


def tile_pass(
    zs: Tensor, comparison: Comparison | None, labels: Labels | None, with_grad: bool
) -> list[Tensor]:
    """Return the divergence and the cross entropy of each row, those of the two that are asked for.

    ``zs`` holds the student's raw products ``(R, V)``. ``with_grad`` overwrites it by the gradient
    of the weighted sum of the results with respect to it.
    """
    losses, label_grad = [], None
    if labels is not None:
        cross_entropy, label_grad = _cross_entropy(zs, labels, with_grad)
        losses.append(cross_entropy)
    if comparison is not None:
        divergence, grad = _divergence(zs, comparison, with_grad)
        losses.insert(0, divergence)
        if grad is not None:
            zs.copy_(grad)
            if label_grad is not None:
                zs.add_(label_grad)
    elif label_grad is not None:
        zs.copy_(label_grad)
    return losses


def _divergence(zs: Tensor, row: Comparison, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    us, slope = row.student(zs)
    ut, _ = row.teacher(row.zt)
    lq, q = softmax(us.clamp(min=FLOOR))
    lp, p = softmax(ut.clamp(min=FLOOR))
    f, h = row.formula(lp, lq, p, q, row.beta)
    loss = f.sum(-1)
    if not with_grad:
        return loss, None
    grad = h - q * h.sum(-1, keepdim=True)
    return loss, grad * (row.weight[:, None] * slope)


def _cross_entropy(zs: Tensor, row: Labels, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    logits, slope = row.student(zs)
    lq, q = softmax(logits.clamp(min=FLOOR))
    cross_entropy = -lq.gather(-1, row.labels[:, None])[:, 0]
    if not with_grad:
        return cross_entropy, None
    columns = torch.arange(zs.shape[-1], device=zs.device)
    residual = q - (columns == row.labels[:, None]).to(lq.dtype)
    return cross_entropy, residual * (row.weight[:, None] * slope)


def as_tensors(logit_map: LogitMap, dtype: torch.dtype) -> LogitMap:
    """Return the map with its numbers as the pass takes them."""
    numbers = {
        name: torch.tensor(value, dtype=dtype)
        for name, value in vars(logit_map).items()
        if isinstance(value, float)
    }
    return replace(logit_map, **numbers)


def is_compiled(device: torch.device, logits: int) -> bool:
    """Say whether a call over ``logits`` pairs of logits compiles its pointwise pass."""
    return device.type != "cpu" or logits >= CPU_COMPILE_LOGITS


def block_rows(device: torch.device, compiled: bool, rows: int, vocab_size: int) -> int:
    """Return how many rows of a tile one step of the pass takes."""
    if device.type == "cpu":
        limit = CPU_COMPILED_BLOCK if compiled else CPU_EAGER_BLOCK
        return min(rows, max(1, limit // vocab_size))
    # Temporaries stay a fraction of the tiles: one block if compiled, about a dozen if not.
    return max(1, rows // (4 if compiled else 16))
