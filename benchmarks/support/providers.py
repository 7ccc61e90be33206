"""The contenders. All of them compute one loss: jsd with beta 1/2, without norm and bias.

The loss is the mean over pairs and tokens. Gradients are computed for the student's hidden states
and head. Peers take one pair per call. For several pairs, their losses are averaged before one
backward pass. Masked tokens do not count. The docstring of each contender says how it excludes
masked tokens.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.support import compat
from benchmarks.support.contenders import Contender, Loss
from benchmarks.support.shapes import Inputs
from lens_kernels import __version__, symmetric_lens_loss
from lens_kernels.backends import compiled, matmul
from lens_kernels.backends.torch import layout, pointwise_pass

PUBLISHED_EPSILON = 1e-8


def per_pair(loss: Callable[..., Tensor], labelled: bool = False) -> Loss:
    """Return a loss of a job's inputs: the mean of ``loss`` over all pairs.

    ``loss`` takes ``(student, student_head, teacher, teacher_head)``, with unmasked rows only. If
    ``labelled``, it takes all rows, and a fifth argument: Liger's labels, which are -100 for masked
    tokens.
    """

    def one(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
        if not labelled:
            student, teacher = inputs.counted(student), inputs.counted(teacher)
        more = [_labels(inputs)] if labelled else []
        return loss(student, inputs.student_head, teacher, inputs.teacher_head, *more)

    def mean(inputs: Inputs) -> Tensor:
        pairs = zip(inputs.student_hidden, inputs.teacher_hidden, strict=True)
        losses = [one(student, teacher, inputs) for student, teacher in pairs]
        # Do not divide a single loss by 1: Liger copies its gradients unless the upstream gradient
        # is exactly 1.
        return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)

    return mean


def _labels(inputs: Inputs) -> Tensor:
    tokens, device = inputs.student_hidden[0].shape[0], inputs.student_head.device
    labels = torch.zeros(tokens, dtype=torch.long, device=device)
    return labels if inputs.mask is None else labels.masked_fill(~inputs.mask, -100)


def ours(inputs: Inputs, backend: str = "torch") -> Tensor:
    """Call lens_kernels once for all pairs, with the mask as an argument."""
    hidden = inputs.student_hidden, inputs.teacher_hidden
    heads = inputs.student_head, inputs.teacher_head
    return symmetric_lens_loss(*hidden, *heads, mask=inputs.mask, backend=backend)


def _lean_jsd(student: Tensor, student_head: Tensor, teacher: Tensor, their_head: Tensor) -> Tensor:
    lq = (student @ student_head.t()).float().log_softmax(-1)
    with torch.no_grad():
        lp = (teacher @ their_head.t()).float().log_softmax(-1)
    lm = torch.logaddexp(lp, lq) - math.log(2)
    jsd = 0.5 * (lp.exp() * (lp - lm)).sum(-1) + 0.5 * (lq.exp() * (lq - lm)).sum(-1)
    return jsd.mean()


dense = per_pair(_lean_jsd)


def _dense_compiled() -> Loss:
    return per_pair(_each_size_apart(torch.compile(_lean_jsd, fullgraph=True)))


@per_pair
def dense_kl_div(
    student: Tensor, student_head: Tensor, teacher: Tensor, their_head: Tensor
) -> Tensor:
    """Plain PyTorch with ``F.kl_div`` and ``logsumexp``. Masked rows are dropped first."""
    lq = functional.log_softmax((student @ student_head.t()).float(), -1)
    with torch.no_grad():
        lp = functional.log_softmax((teacher @ their_head.t()).float(), -1)
    lm = torch.logsumexp(torch.stack([lp, lq]), 0) - math.log(2)
    options: dict[str, Any] = {"reduction": "batchmean", "log_target": True}
    return 0.5 * (functional.kl_div(lm, lp, **options) + functional.kl_div(lm, lq, **options))


def published(inputs: Inputs) -> Tensor:
    """Compute all rows of all pairs at once, as the published code of DistillLens does.

    The mask is applied at the end. Both softmaxes and their mixture ``m`` are kept in float32, and
    the logarithm is ``log(m + 1e-8)``. The mask of that code is wrong for several samples, but
    correct for one sample, as here.
    """

    def softmax(hidden: list[Tensor], head: Tensor) -> Tensor:
        return torch.stack([h @ head.t() for h in hidden]).float().softmax(-1)

    with torch.no_grad():
        p = softmax(inputs.teacher_hidden, inputs.teacher_head)
    q = softmax(inputs.student_hidden, inputs.student_head)
    log_m = ((p + q) / 2 + PUBLISHED_EPSILON).log()
    rows = sum(functional.kl_div(log_m, x, reduction="none").sum(-1) / 2 for x in (p, q))
    assert isinstance(rows, Tensor)
    if inputs.mask is None:
        return rows.mean()
    return (rows * inputs.mask).sum() / (inputs.mask.sum() * len(rows))


def _each_size_apart(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile each size separately, as in training, where there is only one size."""

    def apart(*args: Tensor) -> Tensor:
        with compat.static_sizes():
            return function(*args)

    return apart


def _liger(compiled: bool) -> Loss:
    losses = importlib.import_module("liger_kernel.chunked_loss")
    module = losses.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled
    )
    return per_pair(_each_size_apart(module), labelled=True)


def _liger_fused(kernels: str) -> Loss:
    """Return the loss that runs Liger's fused kernels.

    ``kernels`` chooses among Liger's implementations. The loss computes the logits of all rows, and
    then ignores masked rows.
    """
    fused = importlib.import_module("liger_kernel.ops.fused_linear_jsd").LigerFusedLinearJSDFunction
    if kernels == "nvidia-cutedsl":
        importlib.import_module("cutlass.cute")

    def loss(*args: Tensor) -> Tensor:
        return fused.apply(*args, 0.5, -100, 1.0, None, kernels)

    return per_pair(loss, labelled=True)


def _orda() -> Loss:
    orda = importlib.import_module("orda_kernel")

    def loss(
        student: Tensor, head: Tensor, teacher: Tensor, their_head: Tensor, labels: Tensor
    ) -> Tensor:
        theirs = orda.SeparateTeacher(teacher, their_head)
        weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0}
        kind = {"kl_divergence": "skew_js", "kl_beta": 0.5}
        return orda.distillation_loss(student, head, labels, theirs, **weights, **kind).loss

    return per_pair(loss, labelled=True)


def _trl() -> Loss:
    """Return TRL's function. Masked rows are dropped first, as TRL's trainer does on GPUs.

    On other devices, TRL's trainer computes all rows and masks the losses.
    """
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss(student: Tensor, head: Tensor, teacher: Tensor, their_head: Tensor) -> Tensor:
        rows, _entropy = function.apply(student, head, None, teacher, their_head, None, 0.5)
        return rows.mean()

    return per_pair(loss)


def uncompiled() -> AbstractContextManager[Any]:
    """Make the ``torch`` backend run its pointwise pass without compilation."""
    return mock.patch.object(pointwise_pass, "is_compiled", lambda device, logits: False)


@contextmanager
def _backend_on_fakes() -> Iterator[None]:
    """Return a context in which the ``torch`` backend runs over fake tensors on a CPU.

    The compiled pass accepts only real tensors. A stand-in allocates the same memory: one loss per
    row, and three temporary buffers of the size of the logits (measured, torch 2.13). GEMMs run in
    one piece, because they write to existing buffers, so tiles would not change the memory.
    """
    original = compiled.call

    def call(compile_it: bool, function: Callable[..., Any], zs: Tensor, *args: Any) -> Any:
        if not compile_it:
            return original(False, function, zs, *args)
        blocks = [torch.empty_like(zs) for _ in range(3)]
        return [blocks[0].new_empty(zs.shape[0])], []

    with (
        mock.patch.object(compiled, "call", call),
        mock.patch.object(matmul, "CPU_VOCAB_TILE", 1 << 62),
    ):
        yield


def backend(name: str) -> Contender:
    """Return a backend of this library as a contender."""
    load = functools.partial(functools.partial, ours, backend=name)
    title = f"{OURS.title}, backend {name!r}"
    return replace(OURS, key=name, title=title, load=load)


def _two_streams(inputs: Inputs) -> Tensor:
    """Call the torch backend with two sets of tiles, and memory for tiles of the usual size."""
    hidden = inputs.student_hidden, inputs.teacher_hidden
    heads = inputs.student_head, inputs.teacher_head
    with mock.patch.object(layout, "TILE_SETS", 2):
        return symmetric_lens_loss(
            *hidden, *heads, mask=inputs.mask, backend="torch", workspace_bytes=5 << 29
        )


def _by_key(*contenders: Contender) -> dict[str, Contender]:
    return {contender.key: contender for contender in contenders}


LIGER: dict[str, Any] = {"package": "liger-kernel", "release": "0.8.5"}
ORDA: dict[str, Any] = {"package": "orda-kernel", "release": "0.1.0"}
JSD = "Liger {version} chunked JSD"
TRL: dict[str, Any] = {"package": "trl", "release": "1.16.0"}


def _fused(key: str, title: str, kernels: str) -> Contender:
    title = f"Liger {{version}} fused JSD ({title})"
    return Contender(
        key, title, lambda: _liger_fused(kernels), on_fakes=None, gpu_only=True, **LIGER
    )


OURS = Contender(
    "lens_kernels", f"lens_kernels {__version__}", lambda: ours, on_fakes=_backend_on_fakes
)
PEERS = _by_key(
    Contender("dense", "dense PyTorch, autograd", lambda: dense),
    Contender("dense_kl_div", "dense PyTorch, autograd, F.kl_div", lambda: dense_kl_div),
    # Liger's compiled code cannot run over fake tensors.
    Contender(
        "liger", f"{JSD} (compiled, its default)", lambda: _liger(True), on_fakes=None, **LIGER
    ),
    Contender("liger_uncompiled", f"{JSD} (not compiled)", lambda: _liger(False), **LIGER),
    Contender("trl", "TRL {version} ChunkedDivergence", _trl, **TRL),
)
CONTENDERS = {OURS.key: OURS, **PEERS}

# Contenders that appear only in the comparison of speed.
SPEED_CONTENDERS = _by_key(
    Contender("dense_compiled", "dense PyTorch, torch.compile", _dense_compiled, on_fakes=None),
    Contender(
        "published", "DistillLens as published", lambda: published, epsilon=PUBLISHED_EPSILON
    ),
)
# The torch backend with a second stream, which needs a GPU.
TWO_STREAMS = replace(
    OURS, key="two_streams", title=f"{OURS.title}, two streams", load=lambda: _two_streams,
    gpu_only=True,
)  # fmt: skip
# Contenders that run only on a GPU.
GPU_PEERS = _by_key(
    TWO_STREAMS,
    _fused("liger_fused", "Triton", "nvidia-triton"),
    _fused("liger_hopper", "CuTe", "nvidia-cutedsl"),
    Contender("orda", "ORDA {version}", _orda, on_fakes=None, gpu_only=True, **ORDA),
)
