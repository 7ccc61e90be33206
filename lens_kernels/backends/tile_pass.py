"""The pointwise pass over a tile of logits: statistics, losses, and the gradient in place."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lens_kernels import compat
from lens_kernels.divergence import Formula
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
INDUCTOR: dict[str, Any] = {
    # Recompute what is cheap from the two tiles rather than store it: by default Inductor keeps
    # four more blocks instead of one, and the pass takes 1.6 times as long (2 cores).
    "realize_opcount_threshold": 1 << 30,
    "realize_reads_threshold": 1 << 30,
    # A CPU multiplies and adds in one step, without rounding in between: 10 % of the pass.
    "cpp.enable_floating_point_contract_flag": "fast",
}
# Variants of the pass that a process compiles: divergences, with gradient or without, bias, cap, a
# single row. Past 8 torch would go on uncompiled.
VARIANTS = 64
FLOOR = -1e30  # stands for -inf logits, whose differences would be NaN


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


def tile_pass(
    zs: Tensor,
    zt: Tensor,
    weight: Tensor,
    student: LogitMap,
    teacher: LogitMap,
    formula: Formula,
    beta: Tensor,
    want_grad: bool,
) -> Tensor:
    """Return the divergence of each row; with ``want_grad`` overwrite ``zs`` by its gradient.

    ``zs`` and ``zt`` are raw products ``(R, V)`` of student and teacher. The gradient is that of
    ``sum(weight * divergence)`` with respect to ``zs``. ``formula`` is a function and not a name:
    compiled code is kept for each function it met, but torch 2.13 does not look at an ``Enum`` that
    picks an entry of a table, and would run the first divergence for all. Numbers come as tensors
    without dimensions: of a float torch 2.13 makes a double, which the loops of a CPU would convert
    for every eight logits, a sixth of their time.
    """
    us, slope = student(zs)
    ut, _ = teacher(zt)
    lq, q = softmax(us.clamp(min=FLOOR))
    lp, p = softmax(ut.clamp(min=FLOOR))
    f, h = formula(lp, lq, p, q, beta)
    loss = f.sum(-1)
    if want_grad:
        grad = h - q * h.sum(-1, keepdim=True)
        zs.copy_(grad * (weight[:, None] * slope))
    return loss


def tile_pass_with_labels(
    zs: Tensor,
    zt: Tensor,
    weight: Tensor,
    student: LogitMap,
    teacher: LogitMap,
    formula: Formula,
    beta: Tensor,
    want_grad: bool,
    labels: Tensor,
    label_weight: Tensor,
    untempered: LogitMap,
) -> tuple[Tensor, Tensor]:
    """Do as ``tile_pass`` and add the cross entropy, which knows no temperature."""
    logits, slope = untempered(zs)
    lq, q = softmax(logits.clamp(min=FLOOR))
    cross_entropy = -lq.gather(-1, labels[:, None])[:, 0]
    if want_grad:
        columns = torch.arange(zs.shape[-1], device=zs.device)
        residual = q - (columns == labels[:, None]).to(lq.dtype)
        extra = residual * (label_weight[:, None] * slope)
    loss = tile_pass(zs, zt, weight, student, teacher, formula, beta, want_grad)
    if want_grad:
        zs.add_(extra)
    return loss, cross_entropy


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


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, options=INDUCTOR)


_compiler_failed = False


def run(compiled: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function``, compiled if asked for and if the machine can, else as it stands."""
    global _compiler_failed
    if compiled and not _compiler_failed:
        try:
            with compat.recompile_limit(VARIANTS):
                return _compile(function)(*args)
        except compat.compiler_errors() as error:
            _compiler_failed = True
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"the pointwise pass runs uncompiled, which is slower: {reason}", stacklevel=2
            )
    return function(*args)
