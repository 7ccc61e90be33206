"""Random problems, and their solutions by the library, the oracle, or dense torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lens_kernels import LensHead, LensNorm, distillation_loss, functional, symmetric_lens_loss
from lens_kernels.call import LossCall
from lens_kernels.cost import CallShape
from lens_kernels.options import Divergence
from reference import dense
from tests.support.compare import GRADIENT, LOSS, assert_close, assert_gradients, relative_error
from tests.support.grids import Shape

Gradients = dict[str, Tensor | None]
FIELDS = ("student_hidden", "teacher_hidden", "student_head", "teacher_head")


@dataclass
class Problem:
    """The inputs of a call: hidden states and heads of both models, and options."""

    student_hidden: list[Tensor]
    teacher_hidden: list[Tensor]
    student_head: LensHead
    teacher_head: LensHead
    options: dict[str, Any]

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors that can receive a gradient, by name."""
        hidden = {f"hidden{i}": h for i, h in enumerate(self.student_hidden)}
        return {**hidden, **self.student_head.tensors()}

    def args(self) -> tuple[list[Tensor], list[Tensor], LensHead, LensHead]:
        """Return the positional arguments of ``symmetric_lens_loss``."""
        return self.student_hidden, self.teacher_hidden, self.student_head, self.teacher_head

    def map(self, function: Callable[[Tensor], Tensor], *parts: str) -> Problem:
        """Return a copy of the problem with ``function`` applied to every tensor.

        With ``parts``, only tensors whose field name contains a part are changed.
        """
        fields = {}
        for name in FIELDS:
            value = getattr(self, name)
            if not parts or any(part in name for part in parts):
                values = value if isinstance(value, list) else [value]
                mapped = [
                    x.map(function) if isinstance(x, LensHead) else function(x) for x in values
                ]
                value = mapped if isinstance(value, list) else mapped[0]
            fields[name] = value
        return replace(self, **fields, options=dict(self.options))

    def to(self, target: torch.dtype | torch.device, *parts: str) -> Problem:
        """Return a copy of the problem with its tensors in another dtype or on another device."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(target, copy=True).requires_grad_(x.requires_grad)

        return self.map(leaf, *parts)

    def freeze(self, *trained: str) -> Problem:
        """Require gradients only for the named tensors."""
        for name, x in self.leaves().items():
            x.requires_grad_(name in trained)
        return self

    def imitate(self) -> Problem:
        """Give the student's hidden states and head to the teacher."""
        self.teacher_hidden = [h.detach().clone() for h in self.student_hidden]
        self.teacher_head = self.student_head
        return self

    def spoil(self, rows: Tensor, value: float = float("nan")) -> Problem:
        """Return a copy of the problem with ``value`` in ``rows`` of all hidden states."""

        def spoiled(x: Tensor) -> Tensor:
            y = x.detach().masked_fill(rows[..., None], value)
            return y.requires_grad_(x.requires_grad)

        return self.map(spoiled, "hidden")

    def gradients(self, loss: Tensor, **backward: Any) -> Gradients:
        """Return the gradient of ``loss`` for each tensor that requires a gradient, by name."""
        wanted = {name: x for name, x in self.leaves().items() if x.requires_grad}
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, **backward)
        return dict(zip(wanted, grads, strict=True))


def random_head(
    vocab: int,
    width: int,
    std: float = 1.0,
    *,
    bias: bool = False,
    norm: str | None = None,
    norm_weight: bool = True,
    norm_bias: bool = False,
    offset: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    requires_grad: bool = True,
) -> LensHead:
    """Return a random head. Its logits have standard deviation ``std`` on standard normal rows."""

    def leaf(x: Tensor) -> Tensor:
        return x.requires_grad_(requires_grad)

    lens_norm = None
    if norm is not None:
        lens_norm = LensNorm(
            norm,
            leaf(1 - offset + 0.3 * torch.randn(width)) if norm_weight else None,
            leaf(0.3 * torch.randn(width)) if norm_bias else None,
            eps=1e-3,
            offset=offset,
        )
    weight = leaf(torch.randn(vocab, width) * (std / width**0.5))
    return LensHead(weight, leaf(torch.randn(vocab)) if bias else None, lens_norm, scale, softcap)


def make(shape: Shape, std: float = 1.0, **features: Any) -> Problem:
    """Return a random problem. ``features`` are options of the heads or of the call."""
    head = {
        k: features.pop(k)
        for k in ("bias", "norm", "norm_weight", "norm_bias", "offset", "scale", "softcap")
        if k in features
    }

    def hidden(width: int, grad: bool) -> list[Tensor]:
        each = [torch.randn(*shape.leading, width) for _ in range(shape.pairs)]
        return [x.requires_grad_(grad) for x in each]

    return Problem(
        hidden(shape.student, True),
        hidden(shape.teacher, False),
        random_head(shape.vocab, shape.student, std, **head),
        random_head(shape.vocab, shape.teacher, std, requires_grad=False, **head),
        features,
    )


def related(shape: Shape, std: float, distance: float = 0.05, **features: Any) -> Problem:
    """Return a problem whose teacher is the student plus noise.

    Between unrelated peaked distributions, every divergence is close to its maximum, and gradients
    are noise.
    """
    problem = make(replace(shape, teacher=shape.student), std, **features)

    def near(x: Tensor) -> Tensor:
        return x.detach() + distance * x.detach().std() * torch.randn_like(x)

    problem.teacher_hidden = [near(h) for h in problem.student_hidden]
    problem.teacher_head = problem.student_head.map(near)
    return problem


def with_few_active_entries(shape: Shape, norm: LensNorm | None = None) -> Problem:
    """Return two models whose loss gradient is nearly zero for most vocabulary entries.

    The mean of the head's rows is not zero, so replacing skipped rows by their mean has an effect.
    """
    hidden = [torch.randn(*shape.leading, shape.student) for _ in range(shape.pairs)]
    teacher = [h + 0.3 * torch.randn_like(h) for h in hidden]
    weight = 2.0 * torch.randn(shape.vocab, shape.student) + 3.0
    heads = [LensHead(weight.clone().requires_grad_(grad), norm=norm) for grad in (True, False)]
    return Problem([h.requires_grad_() for h in hidden], teacher, *heads, {})


def nearly_converged(divergence: str, tokens: int = 64, vocab: int = 1024) -> Problem:
    """Return a problem whose logits differ by a few 1e-4, so that the jsd is near 1e-7.

    The head is the identity, so that the logits are not rounded.
    """
    grid = 2.0**-12
    z_t = (torch.randn(tokens, vocab) / grid).round() * grid
    z_s = z_t + (torch.randn(tokens, vocab) * 4).round() * grid
    head = LensHead(torch.eye(vocab))
    return Problem([z_s.requires_grad_()], [z_t], head, head, {"divergence": divergence})


def without_columns(problem: Problem, closed: Tensor) -> tuple[Problem, Problem]:
    """Return two problems with equal results.

    In the first problem, the columns ``closed`` have a bias of -inf. The second problem lacks these
    columns.
    """
    shut, reduced = replace(problem), replace(problem)
    for name in ("student_head", "teacher_head"):
        head = getattr(problem, name)
        grad = head.weight.requires_grad
        bias = head.bias.detach().masked_fill(closed, -float("inf"))
        kept = [x.detach()[~closed].requires_grad_(grad) for x in (head.weight, bias)]
        setattr(shut, name, replace(head, bias=bias.requires_grad_(grad)))
        setattr(reduced, name, replace(head, weight=kept[0], bias=kept[1]))
    return shut, reduced


def teacher_statistics(
    problem: Problem, temperature: float = 1.0, has_final: bool = False
) -> Tensor:
    """Return the maximum of the teacher's logits, and log-sum-exp minus maximum, for each token.

    With ``has_final``, the last hidden state is final, so the norm was already applied to it.
    """
    lenses = len(problem.teacher_hidden) - has_final
    states = []
    for i, h in enumerate(problem.teacher_hidden):
        z = dense.lens_logits(h, problem.teacher_head, i < lenses, None) / temperature
        highest = z.amax(-1)
        states.append(torch.stack([highest, z.logsumexp(-1) - highest], -1))
    return torch.stack(states).detach()


def loss_of(solver: Callable[..., Tensor], problem: Problem, **options: Any) -> Tensor:
    """Return the loss of a problem. ``solver`` is a function such as ``symmetric_lens_loss``."""
    return solver(*problem.args(), **{**problem.options, **options})


def solve(
    solver: Callable[..., Tensor], problem: Problem, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Gradients]:
    """Return ``(loss, gradients)`` of a problem.

    ``solver`` is a function such as ``symmetric_lens_loss``. ``upstream`` is the upstream gradient
    if the loss is not a scalar.
    """
    loss = loss_of(solver, problem, **options)
    return loss, problem.gradients(loss, grad_outputs=upstream)


def objective(
    problem: Problem, function: Callable[..., Any] = distillation_loss, **options: Any
) -> Any:
    """Return the output of the whole objective. The last hidden states are the final outputs."""
    return function(
        problem.student_hidden[:-1],
        problem.teacher_hidden[:-1],
        problem.student_head,
        problem.teacher_head,
        student_final=problem.student_hidden[-1],
        teacher_final=problem.teacher_hidden[-1],
        **{**problem.options, **options},
    )


def ours(problem: Problem, **options: Any) -> tuple[Tensor, Gradients]:
    """Return ``(loss, gradients)`` of a problem, computed by the library."""
    return solve(symmetric_lens_loss, problem, **options)


def oracle(problem: Problem, upstream: Tensor | None = None, **options: Any) -> Any:
    """Return ``(loss, gradients)`` of a problem in float64, computed by the dense oracle."""
    for name in ("backend", "workspace_bytes", "grad_threshold"):
        options.pop(name, None)
    if upstream is None and options.get("reduction") == "none":
        upstream = torch.ones(len(problem.student_hidden), *problem.student_hidden[0].shape[:-1])
    upstream = None if upstream is None else upstream.double()
    return solve(dense.lens_loss, problem.to(torch.float64), upstream, **options)


def check(
    problem: Problem,
    loss_tolerance: float = LOSS,
    gradient_tolerance: float = GRADIENT,
    zero: tuple[str, ...] = (),
    *,
    truth: Problem | None = None,
    upstream: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Gradients]:
    """Compare the library's loss and gradients with the oracle's.

    If ``truth`` is given, the oracle solves ``truth`` instead of the same problem.
    """
    expected, expected_grads = oracle(truth or problem, upstream, **options)
    if upstream is None and expected.dim() > 0:
        upstream = torch.ones(expected.shape)
    loss, grads = ours(problem, upstream=upstream, **options)
    assert_close(loss, expected, loss_tolerance, "loss")
    assert_gradients(grads, expected_grads, gradient_tolerance, zero)
    return loss, grads


def check_beside(
    baseline: tuple[Tensor, Gradients],
    got: tuple[Tensor, Gradients],
    truth: tuple[Tensor, Gradients],
    loss_limit: Callable[[float], float],
    limit: Callable[[float], float],
) -> None:
    """Check that the errors of the solution ``got`` are within limits.

    Each limit is a function of the error of ``baseline``, another solution of the same problem.
    """
    (base, base_grads), (loss, grads), (expected, expected_grads) = baseline, got, truth
    error, most = relative_error(loss, expected), loss_limit(relative_error(base, expected))
    assert error <= most, f"loss: relative error {error:.1e} exceeds {most:.1e}"
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        error, most = (
            relative_error(grads[name], grad),
            limit(relative_error(base_grads[name], grad)),
        )
        assert error <= most, f"{name}: relative error {error:.1e} exceeds {most:.1e}"


def plain_torch(problem: Problem, **options: Any) -> tuple[Tensor, Gradients]:
    """Return ``(loss, gradients)`` of a problem, computed by plain torch.

    Logits have the dtype of the inputs, and log-softmax is in float32.
    """
    return solve(_plain_torch, problem, **options)


def _plain_torch(
    student_hidden: list[Tensor],
    teacher_hidden: list[Tensor],
    student_head: LensHead,
    teacher_head: LensHead,
    *,
    divergence: str = "jsd",
    temperature: float = 1.0,
) -> Tensor:
    def log_probs(h: Tensor, head: LensHead) -> Tensor:
        x = h if head.norm is None else head.norm.forward(h)[0]
        z = F.linear(x, head.weight, head.bias) * head.scale
        z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        return torch.log_softmax(z.float() / temperature, -1)

    total = torch.zeros(())
    for h_s, h_t in zip(student_hidden, teacher_hidden, strict=True):
        lq, lp = log_probs(h_s, student_head), log_probs(h_t, teacher_head).detach()
        total = total + _pointwise(divergence, lp, lq).sum(-1).mean() / len(student_hidden)
    return total


def _pointwise(divergence: str, lp: Tensor, lq: Tensor) -> Tensor:
    p, q, d = lp.exp(), lq.exp(), lp - lq
    if divergence == "jsd":
        lm = torch.logaddexp(lp, lq) - torch.log(torch.tensor(2.0))
        return (p * (lp - lm) + q * (lq - lm)) / 2
    return {
        "jeffreys": (p - q) * d,
        "forward_kl": p * d,
        "reverse_kl": -q * d,
        "tvd": (p - q).abs() / 2,
        "hellinger": ((lp / 2).exp() - (lq / 2).exp()) ** 2 / 2,
    }[divergence]


def call_shape(device: torch.device, fp64: bool = False) -> CallShape:
    """Return the sizes of a small call on a device that this machine need not have."""
    dtype = torch.float64 if fp64 else torch.float32
    sizes = {"tokens": 8, "vocab_size": 16, "student_width": 4, "teacher_width": 4}
    needs = {"head_grad": True, "hidden_grad": True, "workspace_bytes": 1 << 20}
    kinds = (Divergence.JSD,)
    return CallShape(
        **sizes, **needs, divergences=kinds, dtype=dtype, compute_dtype=dtype, device=device
    )


def recorded(monkeypatch: Any, owner: Any, name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """Make a function record its calls. Return the list of their arguments and results."""
    calls, function = [], getattr(owner, name)

    def recorder(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        calls.append((args, result))
        return result

    monkeypatch.setattr(owner, name, recorder)
    return calls


class _Captured(Exception):
    pass


def capture_call(monkeypatch: Any, problem: Problem, whole: bool = False, **options: Any) -> Any:
    """Return the LossCall that a public function passes to its backend.

    With ``whole``, the function is ``distillation_loss``.
    """
    calls: list[LossCall] = []

    def stop(call: LossCall) -> None:
        calls.append(call)
        raise _Captured

    with monkeypatch.context() as patch:
        patch.setattr(functional.operator, "apply", stop)
        try:
            if whole:
                objective(problem, **options)
            else:
                loss_of(symmetric_lens_loss, problem, **options)
        except _Captured:
            pass
    (call,) = calls
    return call
