"""Contenders: several implementations of the same loss.

Their results are compared with the fp64 oracle, and their memory can be counted.
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
    """One implementation of the loss.

    ``load`` imports the packages and returns ``loss(inputs)``. ``on_fakes`` returns a context for a
    run over fake tensors on a CPU. It is None if the contender cannot run over fake tensors.
    ``epsilon`` is a number that the contender adds inside a logarithm. It lowers the loss by at
    most ``epsilon * V``.
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
        """Return the contender's title, with the installed version of its package."""
        return self.title.format(version=version_of(self.package) if self.package else "")

    def columns(self) -> dict[str, str]:
        """Return the contender's name as columns of the CSV."""
        return {"contender": self.key, "label": self.label()}

    def skip_reason(self, device: torch.device) -> str | None:
        """Return the reason why the contender cannot run on a device, or None if it can."""
        if self.gpu_only and device.type == "cpu":
            return "needs a GPU"
        module = self.package.replace("-", "_")
        if self.package and importlib.util.find_spec(module) is None:
            return f"not installed; pip install {self.package}=={self.release}"
        try:
            self.load()
        # Any package that a peer imports may fail in many ways.
        except Exception as error:
            return f"cannot be loaded: {first_line(error)}"
        return None

    def fake_memory(self, job: Job) -> memory.Memory | None:
        """Return the memory of a job, counted over fake tensors, or None if that is impossible."""
        # On a GPU, the peers and the compiled pass launch kernels, which do not accept fake
        # tensors.
        if self.on_fakes is None or job.device.type != "cpu":
            return None
        loss = self.load()
        with self.on_fakes(), compat.fake_tensors():
            inputs = job.make()
            return memory.track(lambda: step(loss, inputs))

    def observe(
        self, inputs: Inputs, instrument: Callable[[Callable[[], Any], torch.device], T]
    ) -> tuple[T, tuple[float, ...]]:
        """Measure one step. Return the measurement, and the step's loss and gradient norms."""
        loss, values = self.load(), []
        inputs.clear()  # free the gradients of an earlier step
        device = inputs.student_head.device
        said = instrument(lambda: values.append(step(loss, inputs)), device)
        norms = (x.grad.norm().item() if x.grad is not None else 0.0 for x in inputs.leaves())
        return said, (values[0].item(), *norms)

    def difference(self, job: Job, seen: tuple[float, ...], other: tuple[float, ...]) -> str | None:
        """Return a text that says how loss or gradient norms differ from ``other``, or None."""
        names = ["loss"] + [f"norm of gradient {i}" for i in range(len(seen) - 1)]
        for name, mine, theirs in zip(names, seen, other, strict=True):
            allowed = 1e-3 * theirs
            if name == "loss":
                allowed = 1e-4 * theirs + self.epsilon * job.vocab
            if not abs(mine - theirs) <= allowed:
                return f"{name} {mine:.6g}, expected {theirs:.6g}"
        return None


def step(loss: Loss, inputs: Inputs) -> Tensor:
    """Clear the gradients, compute loss and gradients, and return the loss without its graph."""
    inputs.clear()
    value = loss(inputs)
    # The upstream gradient is a real tensor even for fake inputs, because Liger reads its value on
    # the host.
    value.backward(gradient=torch.tensor(1.0, device=value.device))
    return value.detach()


def check(contender: Contender, device: torch.device) -> None:
    """Raise an error unless loss and gradients agree with the fp64 oracle.

    The job has two small pairs. It is checked without a mask and with a mask.
    """
    problems = [x for masked in (0.0, 0.4) for x in _problems(contender, device, masked)]
    if problems:
        raise RuntimeError(f"{contender.label()} gives a wrong result: {'; '.join(problems)}")


def _problems(contender: Contender, device: torch.device, masked: float) -> list[str]:
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
        problems.append(f"loss {value:.8g}, expected {exact:.8g}")
    for i, (grad, x) in enumerate(zip(found, inputs.leaves(), strict=True)):
        if grad is None:
            problems.append(f"no gradient {i}")
            continue
        assert x.grad is not None
        error = ((grad - x.grad).abs().max() / x.grad.abs().max()).item()
        if not error <= 1e-4:
            problems.append(f"gradient {i} is off by {error:.1e} of its largest entry")
    return [f"{problem} ({masked:.0%} masked)" for problem in problems] if masked else problems


def gather(
    contenders: Mapping[str, Contender], device: torch.device, needed: Container[str]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the contenders that run on a device, and the reasons why others do not.

    A contender that fails or gives a wrong result is left out. If it is in ``needed``, its error is
    raised instead.
    """
    present: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for key, contender in contenders.items():
        reason = contender.skip_reason(device)
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
    """Return an error's class and message as one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
