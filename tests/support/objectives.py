"""Problems for the whole objective, with final outputs and labels, and each term's true value."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lens_kernels import SparseTargets, distillation_loss
from reference import adaptive, dense
from tests.support.compare import assert_close, assert_gradients
from tests.support.grids import BATCH, Shape
from tests.support.problems import Gradients, Problem, make, objective


def make_objective(shape: Shape = BATCH, std: float = 2.0, **features: Any) -> Problem:
    """Return a problem with the lens pairs of ``shape``, and the final outputs as the last pair."""
    return make(replace(shape, pairs=shape.pairs + 1), std, **features)


def some_labels(shape: Shape = BATCH) -> Tensor:
    """Return random labels, with -100 for about 30 % of the positions."""
    labels = torch.randint(shape.vocab, shape.leading)
    return labels.masked_fill(torch.rand(shape.leading) < 0.3, -100)


def some_targets(
    shape: Shape = BATCH, k: int = 6, rest: str | None = None, vocab: int | None = None
) -> SparseTargets:
    """Return targets with repeated ids and padding. Probabilities sum to less than 1."""
    ids = torch.randint(vocab or shape.vocab, (*shape.leading, k))
    ids[..., 1] = ids[..., 0]
    p = torch.rand(*shape.leading, k).softmax(-1) * 0.8
    p[..., -1] = 0.0
    return SparseTargets(ids, p, rest)


def terms_of(
    problem: Problem,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    kd_ratio: float = 1.0,
    lens_coeff: float = 1.0,
    final_divergence: Any = "reverse_kl",
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    layer_weights: list[float] | None = None,
    denominator: float | None = None,
    vocab_size: int | None = None,
) -> SimpleNamespace:
    """Return the true terms of the objective for a problem, in float64.

    Divergences come from the oracle, and the cross entropy from torch.
    """
    s, t, s_head, t_head = problem.args()
    *lenses, last = range(len(s))
    if mask is None:
        mask = torch.ones(s[0].shape[:-1]) if labels is None else labels != -100
    tokens = denominator or max(1, int(mask.sum()))

    def mean(i: int, name: str, normed: bool) -> Tensor:
        z_s = dense.lens_logits(s[i], s_head, normed, vocab_size)
        z_t = dense.lens_logits(t[i], t_head, normed, vocab_size).detach()
        q, p = dense.softmax(z_s / temperature), dense.softmax(z_t / temperature)
        akl = name == "akl"
        rows = adaptive.adaptive_kl(p, q) if akl else dense.divergence(name, p, q, beta)
        return (rows * mask).sum() / tokens

    sums = {final_divergence: 1.0} if isinstance(final_divergence, str) else final_divergence
    zero = torch.zeros((), dtype=torch.float64)
    kd = sum((weight * mean(last, name, False) for name, weight in sums.items()), zero)
    per_layer = [mean(i, divergence, True) for i in lenses]
    weights = layer_weights or [1 / max(1, len(lenses))] * len(lenses)
    lens = sum((w * x for w, x in zip(weights, per_layer, strict=True)), zero)
    loss, ce = kd_ratio * (kd + lens_coeff * lens), None
    if labels is not None:
        counted = torch.where(mask.bool(), labels.long(), -100).flatten()
        logits = dense.lens_logits(s[last], s_head, False, vocab_size).flatten(0, -2)
        ce = F.cross_entropy(logits, counted, ignore_index=-100, reduction="sum")
        ce = ce / (denominator or max(1, int((counted != -100).sum())))
        loss = loss + (1 - kd_ratio) * ce
    per_layer = torch.stack(per_layer) if lenses else torch.zeros(0)
    lens = lens if lenses else None
    return SimpleNamespace(loss=loss, ce=ce, kd=kd, lens=lens, per_layer=per_layer, n=mask.sum())


def solve_objective(
    problem: Problem, function: Any = distillation_loss, **options: Any
) -> tuple[Any, Gradients]:
    """Return the library's output for a problem, and the gradients of its loss."""
    out = objective(problem, function, **options)
    return out, problem.gradients(out.loss)


def check_objective(
    problem: Problem,
    tolerance: float = 1e-6,
    gradient_tolerance: float | None = None,
    zero: tuple[str, ...] = (),
    *,
    backend: str = "auto",
    room: int | None = None,
    **options: Any,
) -> Any:
    """Compare every term and gradient with its true value, and return the library's output."""
    wide = problem.to(torch.float64)
    truth = terms_of(wide, **{**problem.options, **options})
    out, grads = solve_objective(problem, backend=backend, workspace_bytes=room, **options)
    for name in ("loss", "ce", "kd", "lens", "per_layer"):
        value, expected = getattr(out, name), getattr(truth, name)
        assert (value is None) == (expected is None), name
        if value is not None:
            assert_close(value, expected, tolerance, name)
            assert value.requires_grad == (name == "loss")
    assert out.num_tokens == truth.n
    expected_grads = {
        name: torch.zeros(1) if grad is None else grad
        for name, grad in wide.gradients(truth.loss).items()
    }
    assert_gradients(grads, expected_grads, gradient_tolerance or 10 * tolerance, zero)
    return out
