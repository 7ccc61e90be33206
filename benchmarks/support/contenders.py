"""One way to compute the loss of a job: whether it runs here, is right, and what memory it takes.

What a contender computes is compared with the fp64 oracle before it is measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.support import compat, memory
from benchmarks.support.environment import version_of
from benchmarks.support.shapes import Inputs, Job
from lens_kernels import LensHead
from reference import dense as oracle

T = TypeVar("T")
Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss of a job.

    ``load`` imports what it needs and returns ``loss(inputs)``. ``on_fakes`` prepares a run over
    fake tensors on a CPU; None says that there can be none. ``epsilon`` is what its logarithm adds
    to the mixture, which lowers the loss by ``epsilon * V`` at most.
    """

    key: str
    title: str
    load: Callable[[], Loss]
    package: str = ""
    release: str = ""
    on_fakes: Callable[[], AbstractContextManager[Any]] | None = nullcontext
    epsilon: float = 0.0
    gpu_only: bool = False

    def label(self) -> str:
        """Return the title with the installed version."""
        return self.title.format(version=version_of(self.package) if self.package else "")

    def columns(self) -> dict[str, str]:
        """Return its names in a CSV."""
        return {"contender": self.key, "label": self.label()}

    def objection(self, device: torch.device) -> str | None:
        """Say why the contender cannot run on a device, or return None."""
        if self.gpu_only and device.type == "cpu":
            return "needs a GPU"
        module = self.package.replace("-", "_")
        if self.package and importlib.util.find_spec(module) is None:
            return f"not installed; pip install {self.package}=={self.release}"
        try:
            self.load()
        except Exception as error:  # peers pull in much that can fail in its own way
            return f"cannot be loaded: {first_line(error)}"
        return None

    def fake_memory(self, job: Job) -> memory.Memory | None:
        """Return what a run over fake tensors counts, where there can be one."""
        # On a GPU the peers and the compiled pass launch kernels, which take no fake tensors.
        if self.on_fakes is None or job.device.type != "cpu":
            return None
        loss = self.load()
        with self.on_fakes(), compat.fake_tensors():
            inputs = job.make()
            return memory.track(lambda: step(loss, inputs))

    def observe(
        self, inputs: Inputs, instrument: Callable[[Callable[[], Any], torch.device], T]
    ) -> tuple[T, tuple[float, ...]]:
        """Return what an instrument says of one step, and the step's loss and gradient norms."""
        loss, values = self.load(), []
        inputs.clear()  # before the instrument looks
        device = inputs.student_head.device
        said = instrument(lambda: values.append(step(loss, inputs)), device)
        norms = (x.grad.norm().item() if x.grad is not None else 0.0 for x in inputs.leaves())
        return said, (values[0].item(), *norms)

    def difference(self, job: Job, seen: tuple[float, ...], other: tuple[float, ...]) -> str | None:
        """Say where a loss and its gradient norms differ from those of others, or return None."""
        names = ["loss"] + [f"norm of gradient {i}" for i in range(len(seen) - 1)]
        for name, mine, theirs in zip(names, seen, other, strict=True):
            allowed = 1e-3 * theirs
            if name == "loss":
                allowed = 1e-4 * theirs + self.epsilon * job.vocab
            if not abs(mine - theirs) <= allowed:
                return f"{name} {mine:.6g}, expected {theirs:.6g}"
        return None


def step(loss: Loss, inputs: Inputs) -> Tensor:
    """Compute the loss and its gradients anew; the value is returned without its graph."""
    inputs.clear()
    value = loss(inputs)
    # A constant, because Liger reads the upstream gradient on the host, where a fake has no value.
    value.backward(gradient=torch.tensor(1.0, device=value.device))
    return value.detach()


def check(contender: Contender, device: torch.device) -> None:
    """Raise unless loss and gradients are those of the fp64 oracle for two small pairs.

    Once with all tokens, and once with some of them masked.
    """
    problems = [x for masked in (0.0, 0.4) for x in _problems(contender, device, masked)]
    if problems:
        raise RuntimeError(f"{contender.label()} computes something else: {'; '.join(problems)}")


def _problems(contender: Contender, device: torch.device, masked: float) -> list[str]:
    """Return the differences from the oracle."""

    def truth(inputs: Inputs) -> Tensor:
        heads = LensHead(inputs.student_head), LensHead(inputs.teacher_head)
        hidden = inputs.student_hidden, inputs.teacher_hidden
        return oracle.lens_loss(*hidden, *heads, mask=inputs.mask)

    job = Job(24, 1000, 2, student_width=48, teacher_width=80, device=device, masked=masked)
    inputs = job.make()
    value = step(contender.load(), inputs).item()
    found = [x.grad for x in inputs.leaves()]
    exact = step(truth, inputs).item()
    problems = []
    if not abs(value - exact) <= 1e-5 * exact + contender.epsilon * job.vocab:
        problems.append(f"loss {value:.8g} instead of {exact:.8g}")
    for i, (grad, x) in enumerate(zip(found, inputs.leaves(), strict=True)):
        if grad is None:
            problems.append(f"no gradient {i}")
        elif not (error := ((grad - x.grad).abs().max() / x.grad.abs().max()).item()) <= 1e-4:
            problems.append(f"gradient {i} is off by {error:.1e} of its largest entry")
    return [f"{problem} ({masked:.0%} masked)" for problem in problems] if masked else problems


def gather(
    contenders: Mapping[str, Contender], device: torch.device, needed: Container[str]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the contenders that run on a device, and the reasons of the others.

    One that fails, or computes something else, is among the others. If it is ``needed``, the run
    ends.
    """
    present: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for key, contender in contenders.items():
        reason = contender.objection(device)
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
