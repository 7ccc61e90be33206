"""The contenders, all on one job: jsd with beta 1/2, no norm, no bias, mean over pairs and tokens.

Gradients go to the student's hidden states and to its head. The peers know one pair per call, so
for several pairs their losses are averaged, as a user would, before one backward pass.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import version_of
from lens_kernels import LensHead, __version__, symmetric_lens_loss
from lens_kernels.backends import matmul, tile_pass
from reference import dense as oracle


@dataclass(frozen=True)
class Job:
    """The sizes of a problem; the widths are those of GPT-2 small under GPT-2 XL."""

    tokens: int
    vocab: int
    pairs: int = 1
    student_width: int = 768
    teacher_width: int = 1600
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def gemm_flops(self) -> int:
        """Return the floor: two projections and two gradients for each pair."""
        width = 3 * self.student_width + self.teacher_width
        return 2 * self.pairs * self.tokens * self.vocab * width

    def make(self) -> Inputs:
        """Return inputs whose lenses are neither flat nor one-hot; fakes under ``fake_tensors``."""
        torch.manual_seed(0)

        def random(rows: int, width: int, scale: float) -> Tensor:
            # Rows repeat after 8192: a benchmark does not wait for 10^9 random numbers.
            block = torch.randn(min(rows, 8192), width, device=self.device) * scale
            return block.repeat(-(-rows // block.shape[0]), 1)[:rows].to(self.dtype)

        widths = (self.student_width, self.teacher_width)
        student, teacher = (
            [random(self.tokens, width, 1.0) for _ in range(self.pairs)] for width in widths
        )
        heads = [random(self.vocab, width, 1.5 / math.sqrt(width)) for width in widths]
        for x in (*student, heads[0]):
            x.requires_grad_()
        return Inputs(student, teacher, *heads)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Hidden states ``(N, D)`` for each pair, and heads ``(V, D)``."""

    student_hidden: list[Tensor]
    teacher_hidden: list[Tensor]
    student_head: Tensor
    teacher_head: Tensor

    def leaves(self) -> list[Tensor]:
        """Return the tensors that get gradients."""
        return [*self.student_hidden, self.student_head]

    def clear(self) -> None:
        """Drop the gradients."""
        for x in self.leaves():
            x.grad = None

    def pairs(self, count: int) -> Inputs:
        """Return the first ``count`` pairs."""
        return replace(
            self,
            student_hidden=self.student_hidden[:count],
            teacher_hidden=self.teacher_hidden[:count],
        )


def per_pair(loss: Callable[[Tensor, Tensor, Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """Make the loss of one pair the mean over all pairs."""

    def mean(inputs: Inputs) -> Tensor:
        pairs = zip(inputs.student_hidden, inputs.teacher_hidden, strict=True)
        losses = [loss(student, teacher, inputs) for student, teacher in pairs]
        # Not divided by 1: Liger copies its gradients unless the upstream gradient is exactly 1.
        return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)

    return mean


def ours(inputs: Inputs, backend: str = "auto") -> Tensor:
    """All pairs in one call, with the defaults."""
    heads = inputs.student_head, inputs.teacher_head
    return symmetric_lens_loss(
        inputs.student_hidden, inputs.teacher_hidden, *heads, backend=backend
    )


@per_pair
def dense(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
    """Plain differentiable PyTorch, with as few passes over the logits as it can be written."""
    lq = (student @ inputs.student_head.t()).float().log_softmax(-1)
    with torch.no_grad():
        lp = (teacher @ inputs.teacher_head.t()).float().log_softmax(-1)
    lm = torch.logaddexp(lp, lq) - math.log(2)
    jsd = 0.5 * (lp.exp() * (lp - lm)).sum(-1) + 0.5 * (lq.exp() * (lq - lm)).sum(-1)
    return jsd.mean()


@per_pair
def dense_kl_div(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
    """Plain PyTorch with its own divergence: ``F.kl_div`` against a mixture by ``logsumexp``."""
    lq = functional.log_softmax((student @ inputs.student_head.t()).float(), -1)
    with torch.no_grad():
        lp = functional.log_softmax((teacher @ inputs.teacher_head.t()).float(), -1)
    lm = torch.logsumexp(torch.stack([lp, lq]), 0) - math.log(2)
    options: dict[str, Any] = {"reduction": "batchmean", "log_target": True}
    return 0.5 * (functional.kl_div(lm, lp, **options) + functional.kl_div(lm, lq, **options))


def _liger(compiled: bool) -> Callable[[Inputs], Tensor]:
    losses = importlib.import_module("liger_kernel.chunked_loss")
    module = losses.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled
    )

    @per_pair
    def loss(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
        labels = torch.zeros(student.shape[0], dtype=torch.long, device=student.device)
        heads = inputs.student_head, inputs.teacher_head
        # Each size gets code of its own, as in training, which has one size only. After the first
        # size the compiler would turn to code for any size, measured to take 1.5 times the memory.
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
            return module(student, heads[0], teacher, heads[1], labels)

    return loss


def _trl() -> Callable[[Inputs], Tensor]:
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    @per_pair
    def loss(student: Tensor, teacher: Tensor, inputs: Inputs) -> Tensor:
        heads = (inputs.student_head, None), (inputs.teacher_head, None)
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
    student's logits, and meanwhile allocates one block of their size (measured, torch 2.13). The
    products are made in one piece: they write into what exists, whatever the size of the piece.
    """
    original = tile_pass.run

    def run(compiled: bool, function: Callable[..., Any], zs: Tensor, *args: Any) -> Any:
        if not compiled:
            return original(False, function, zs, *args)
        torch.empty_like(zs)
        return zs.new_empty(zs.shape[0])

    with replaced(tile_pass, run=run), replaced(matmul, CPU_VOCAB_TILE=1 << 62):
        yield


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss of a job.

    ``load`` imports what it needs and returns ``loss(inputs)``. ``on_fakes`` prepares a run over
    fake tensors on a CPU; it is None where there can be none.
    """

    key: str
    title: str
    load: Callable[[], Callable[[Inputs], Tensor]]
    package: str = ""
    release: str = ""
    on_fakes: Callable[[], AbstractContextManager[None]] | None = nullcontext

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


LIGER = {"package": "liger-kernel", "release": "0.8.5"}
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


def step(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """Compute the loss and its gradients; the value is returned without its graph."""
    value = loss(inputs)
    # A constant, because Liger reads the upstream gradient on the host, where a fake has no value.
    value.backward(gradient=torch.tensor(1.0, device=value.device))
    return value.detach()


def check(contender: Contender, device: torch.device) -> None:
    """Raise unless loss and gradients are those of the fp64 oracle for two small pairs."""
    sizes = {"student_width": 48, "teacher_width": 80, "device": device}
    inputs = Job(tokens=24, vocab=1000, pairs=2, **sizes).make()  # type: ignore[arg-type]
    value = step(contender.load(), inputs)
    got = [x.grad for x in inputs.leaves()]
    inputs.clear()
    heads = LensHead(inputs.student_head), LensHead(inputs.teacher_head)
    exact = oracle.lens_loss(inputs.student_hidden, inputs.teacher_hidden, *heads)
    exact.backward()
    problems = []
    if not abs(value.item() - exact.item()) <= 1e-5 * exact.item():
        problems.append(f"loss {value.item():.8g} instead of {exact.item():.8g}")
    for i, (x, ours_or_theirs) in enumerate(zip(inputs.leaves(), got, strict=True)):
        assert x.grad is not None
        if ours_or_theirs is None:
            problems.append(f"no gradient {i}")
            continue
        error = ((ours_or_theirs - x.grad).abs().max() / x.grad.abs().max()).item()
        if not error <= 1e-4:
            problems.append(f"gradient {i} is off by {error:.1e} of its largest entry")
    if problems:
        raise RuntimeError(f"{contender.label()} computes something else: {'; '.join(problems)}")
