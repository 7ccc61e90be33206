"""The contenders, all on one job: jsd with beta 1/2, no norm, no bias, mean over pairs and tokens.

Gradients go to the student's hidden states and to its head. The peers know one pair per call, so
for several pairs their losses are averaged, as a user would, before one backward pass. Masked
tokens do not count; each contender's docstring says what it does about them.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import version_of
from benchmarks.shapes import Inputs, Job
from lens_kernels import LensHead, __version__, symmetric_lens_loss
from lens_kernels.backends import matmul, tile_pass
from reference import dense as oracle


def per_pair(loss: Callable[[Tensor, Tensor, Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """Make the loss of one pair the mean over all pairs."""

    def mean(inputs: Inputs) -> Tensor:
        pairs = zip(inputs.student_hidden, inputs.teacher_hidden, strict=True)
        losses = [loss(student, teacher, inputs) for student, teacher in pairs]
        # Not divided by 1: Liger copies its gradients unless the upstream gradient is exactly 1.
        return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)

    return mean


def ours(inputs: Inputs, backend: str = "torch") -> Tensor:
    """All pairs in one call; the mask is an argument."""
    return symmetric_lens_loss(
        inputs.student_hidden,
        inputs.teacher_hidden,
        inputs.student_head,
        inputs.teacher_head,
        mask=inputs.mask,
        backend=backend,
    )


def _lean_jsd(student: Tensor, teacher: Tensor, student_head: Tensor, their_head: Tensor) -> Tensor:
    lq = (student @ student_head.t()).float().log_softmax(-1)
    with torch.no_grad():
        lp = (teacher @ their_head.t()).float().log_softmax(-1)
    lm = torch.logaddexp(lp, lq) - math.log(2)
    jsd = 0.5 * (lp.exp() * (lp - lm)).sum(-1) + 0.5 * (lq.exp() * (lq - lm)).sum(-1)
    return jsd.mean()


@per_pair
def dense(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
    """Plain PyTorch, with as few passes as it can be written; masked rows are dropped first."""
    rows = inputs.counted(student), inputs.counted(teacher)
    return _lean_jsd(*rows, inputs.student_head, inputs.teacher_head)


def _dense_compiled() -> Callable[[Inputs], Tensor]:
    """Return the same as one graph for ``torch.compile``, but for the dropping of masked rows."""
    compiled = torch.compile(_lean_jsd, fullgraph=True)

    @per_pair
    def loss(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
        rows = inputs.counted(student), inputs.counted(teacher)
        with _code_for_each_size():
            return compiled(*rows, inputs.student_head, inputs.teacher_head)

    return loss


@per_pair
def dense_kl_div(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
    """Plain PyTorch with ``F.kl_div`` and ``logsumexp``; masked rows are dropped first."""
    student, teacher = inputs.counted(student), inputs.counted(teacher)
    lq = functional.log_softmax((student @ inputs.student_head.t()).float(), -1)
    with torch.no_grad():
        lp = functional.log_softmax((teacher @ inputs.teacher_head.t()).float(), -1)
    lm = torch.logsumexp(torch.stack([lp, lq]), 0) - math.log(2)
    options: dict[str, Any] = {"reduction": "batchmean", "log_target": True}
    return 0.5 * (functional.kl_div(lm, lp, **options) + functional.kl_div(lm, lq, **options))


def published(inputs: Inputs) -> Tensor:
    """DistillLens as published: all rows of all pairs at once, multiplied by the mask at the end.

    Both softmaxes and their mixture are held, in float32, and the mixture's logarithm is that of
    ``m + 1e-8``. One sample: there the mask's tiling of the published code is right.
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


@contextmanager
def _code_for_each_size() -> Iterator[None]:
    """Compile each size apart, as in training, which has one size only.

    After the first size the compiler would turn to code for any size, measured to take 1.5 times
    the memory.
    """
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        yield


def _labels(inputs: Inputs) -> Tensor:
    """Return labels for Liger, which leaves out the loss where they are -100."""
    tokens, device = inputs.student_hidden[0].shape[0], inputs.student_head.device
    labels = torch.zeros(tokens, dtype=torch.long, device=device)
    return labels if inputs.mask is None else labels.masked_fill(~inputs.mask, -100)


def _liger(compiled: bool) -> Callable[[Inputs], Tensor]:
    """Return Liger's chunked loss; it projects all rows and ignores the labels of masked ones."""
    losses = importlib.import_module("liger_kernel.chunked_loss")
    module = losses.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled
    )

    @per_pair
    def loss(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
        heads = inputs.student_head, inputs.teacher_head
        with _code_for_each_size():
            return module(student, heads[0], teacher, heads[1], _labels(inputs))

    return loss


def _liger_fused() -> Callable[[Inputs], Tensor]:
    """Return Liger's Triton operator; it projects all rows and ignores labels as above."""
    fused = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
    module = fused.LigerFusedLinearJSD(jsd_beta=0.5)

    @per_pair
    def loss(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
        heads = inputs.student_head, inputs.teacher_head
        return module(student, heads[0], teacher, heads[1], _labels(inputs))

    return loss


def _trl() -> Callable[[Inputs], Tensor]:
    """Return TRL's function; masked rows are dropped first, as its trainer does on GPUs.

    Elsewhere that trainer projects all rows, to keep their number, and masks the losses.
    """
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    @per_pair
    def loss(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
        heads = (inputs.student_head, None), (inputs.teacher_head, None)
        student, teacher = inputs.counted(student), inputs.counted(teacher)
        rows, _entropy = function.apply(student, *heads[0], teacher, *heads[1], 0.5)
        return rows.mean()

    return loss


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Give attributes of a module other values meanwhile."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def uncompiled() -> AbstractContextManager[None]:
    """Make the ``torch`` backend run its pointwise pass without the compiler."""
    return replaced(tile_pass, is_compiled=lambda device, logits: False)


@contextmanager
def _backend_on_fakes() -> Iterator[None]:
    """Let fake tensors through the ``torch`` backend on a CPU.

    Its compiled pass, which takes real tensors only, returns one loss per row, overwrites the
    student's logits, and meanwhile holds three blocks of their size (measured, torch 2.13). The
    products are made in one piece: they write into what exists, whatever the size of the piece.
    """
    original = tile_pass.run

    def run(compiled: bool, function: Callable[..., Any], zs: Tensor, *args: Any) -> Any:
        if not compiled:
            return original(False, function, zs, *args)
        blocks = [torch.empty_like(zs) for _ in range(3)]
        return blocks[0].new_empty(zs.shape[0])

    with replaced(tile_pass, run=run), replaced(matmul, CPU_VOCAB_TILE=1 << 62):
        yield


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss of a job.

    ``load`` imports what it needs and returns ``loss(inputs)``. ``on_fakes`` prepares a run over
    fake tensors on a CPU; it is None where there can be none. ``epsilon`` is what its logarithm
    adds to the mixture, which lowers the loss by ``epsilon * V`` at most.
    """

    key: str
    title: str
    load: Callable[[], Callable[[Inputs], Tensor]]
    package: str = ""
    release: str = ""
    on_fakes: Callable[[], AbstractContextManager[None]] | None = nullcontext
    epsilon: float = 0.0
    gpu_only: bool = False

    def label(self) -> str:
        """Return the title with the version that is installed."""
        return self.title.format(version=version_of(self.package) if self.package else "")

    def install(self) -> str:
        """Return the command that installs a peer."""
        return f"pip install {self.package}=={self.release}"

    def objection(self) -> str | None:
        """Say why the contender is missing, or return None."""
        module = self.package.replace("-", "_")
        if self.package and importlib.util.find_spec(module) is None:
            return f"not installed; {self.install()}"
        try:
            self.load()
        except Exception as error:  # peers pull in much that can fail in its own way
            return f"cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}"
        return None


PUBLISHED_EPSILON = 1e-8
LIGER: dict[str, Any] = {"package": "liger-kernel", "release": "0.8.5"}
CONTENDERS = {
    contender.key: contender
    for contender in (
        Contender(
            "lens_kernels",
            f"lens_kernels {__version__}",
            lambda: ours,
            on_fakes=_backend_on_fakes,
        ),
        Contender("dense", "dense PyTorch, autograd", lambda: dense),
        Contender("dense_kl_div", "dense PyTorch, autograd, F.kl_div", lambda: dense_kl_div),
        Contender(
            "liger",
            "Liger {version} chunked JSD (compiled, its default)",
            lambda: _liger(compiled=True),
            on_fakes=None,  # the compiler needs real tensors
            **LIGER,
        ),
        Contender(
            "liger_uncompiled",
            "Liger {version} chunked JSD (not compiled)",
            lambda: _liger(compiled=False),
            **LIGER,
        ),
        Contender("trl", "TRL {version} ChunkedDivergence", _trl, package="trl", release="1.16.0"),
    )
}

# Of the comparison of speed alone.
SPEED_CONTENDERS = {
    contender.key: contender
    for contender in (
        Contender(
            "dense_compiled",
            "dense PyTorch, torch.compile",
            _dense_compiled,
            on_fakes=None,
        ),
        Contender(
            "published",
            "DistillLens as published",
            lambda: published,
            epsilon=PUBLISHED_EPSILON,
        ),
        Contender(
            "liger_fused",
            "Liger {version} fused JSD (Triton)",
            _liger_fused,
            on_fakes=None,
            gpu_only=True,
            **LIGER,
        ),
    )
}


def step(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """Compute the loss and its gradients; the value is returned without its graph."""
    value = loss(inputs)
    # A constant, because Liger reads the upstream gradient on the host, where a fake has no value.
    value.backward(gradient=torch.tensor(1.0, device=value.device))
    return value.detach()


def check(contender: Contender, device: torch.device) -> None:
    """Raise unless loss and gradients are those of the fp64 oracle for two small pairs.

    Twice: with all tokens, and with some of them masked.
    """
    problems = [x for masked in (0.0, 0.4) for x in _problems(contender, device, masked)]
    if problems:
        raise RuntimeError(f"{contender.label()} computes something else: {'; '.join(problems)}")


def _problems(contender: Contender, device: torch.device, masked: float) -> list[str]:
    """Return what differs from the oracle."""
    sizes = {"student_width": 48, "teacher_width": 80, "device": device, "masked": masked}
    job = Job(tokens=24, vocab=1000, pairs=2, **sizes)  # type: ignore[arg-type]
    inputs = job.make()
    value = step(contender.load(), inputs)
    got = [x.grad for x in inputs.leaves()]
    inputs.clear()
    heads = LensHead(inputs.student_head), LensHead(inputs.teacher_head)
    hidden = inputs.student_hidden, inputs.teacher_hidden
    exact = oracle.lens_loss(*hidden, *heads, mask=inputs.mask)
    exact.backward()
    problems = []
    allowed = 1e-5 * exact.item() + contender.epsilon * job.vocab
    if not abs(value.item() - exact.item()) <= allowed:
        problems.append(f"loss {value.item():.8g} instead of {exact.item():.8g}")
    for i, (x, ours_or_theirs) in enumerate(zip(inputs.leaves(), got, strict=True)):
        assert x.grad is not None
        if ours_or_theirs is None:
            problems.append(f"no gradient {i}")
            continue
        error = ((ours_or_theirs - x.grad).abs().max() / x.grad.abs().max()).item()
        if not error <= 1e-4:
            problems.append(f"gradient {i} is off by {error:.1e} of its largest entry")
    return [f"{problem} ({masked:.0%} masked)" for problem in problems] if masked else problems


def gather(
    contenders: Mapping[str, Contender], device: torch.device, needed: Container[str]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the contenders that run on a device, and the reasons of the others.

    One that fails, or computes something else, is one of those; if it is ``needed`` it ends the
    run.
    """
    present: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for key, contender in contenders.items():
        reason = contender.objection()
        if contender.gpu_only and device.type == "cpu":
            reason = "needs a GPU"
        if reason is None:
            print(f"checking {contender.label()}", flush=True)
            try:
                check(contender, device)
            except Exception as error:
                if key in needed:
                    raise
                reason = first_line(error)
        if reason is None:
            present[key] = contender
        else:
            missing[key] = reason
            print(f"  {contender.label()}: {reason}", flush=True)
    return present, missing


def first_line(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
