"""Targets that replace a teacher: a few probabilities for each token, from a file or a server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens_kernels.options import Divergence, LossOptions

RESTS = (None, "renormalize", "ghost", "uniform")
# Probabilities in 16-bit files may sum to slightly more than 1.
TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """The probabilities of ``K`` tokens at each position. A label is the case ``K = 1``.

    ``rest`` decides how the remaining mass ``1 - sum_k probabilities_k`` is treated:

    - None: the mass is ignored. The probabilities are used as they are, and need not sum to 1. So
    sampled tokens with importance weights give an unbiased gradient.
    - ``"renormalize"``: the probabilities are divided by their sum. This is biased if they are
    those of the most probable tokens.
    - ``"ghost"``: one more entry holds the mass of all other tokens, of the teacher and of the
      student. The loss is a lower bound of the KL divergence over all tokens. If all tokens are
      listed, there is no such entry.
    - ``"uniform"``: the mass is spread evenly over the whole vocabulary.

    The temperature divides the student's logits only.

    Attributes:
        token_ids: ``(..., K)``, int64 or int32. If a position has an id twice, its probabilities
            are added.
        probabilities: ``(..., K)``, floating point, at least 0. Entries with 0 are padding.
        rest: None, ``"renormalize"``, ``"ghost"`` or ``"uniform"``.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: The shapes differ, or ``rest`` is unknown.
    """

    token_ids: Tensor
    probabilities: Tensor
    rest: str | None = None

    def __post_init__(self) -> None:
        """Check everything that does not depend on the hidden states."""
        for name, kinds in (("token_ids", "int64 or int32"), ("probabilities", "floating point")):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise TypeError(f"SparseTargets.{name} must be a tensor, got {kind}")
            whole = value.dtype in (torch.int64, torch.int32)
            if not (whole if name == "token_ids" else value.is_floating_point()):
                raise TypeError(f"SparseTargets.{name} must be {kinds}, got {value.dtype}")
        ids, p = self.token_ids, self.probabilities
        if ids.shape != p.shape or ids.dim() < 2 or not ids.shape[-1]:
            raise ValueError(
                "SparseTargets.token_ids and probabilities must both have shape (..., K) with K"
                f" above 0, got {tuple(ids.shape)} and {tuple(p.shape)}"
            )
        if self.rest not in RESTS:
            known = ", ".join(map(repr, RESTS))
            raise ValueError(f"SparseTargets.rest={self.rest!r} is unknown; choose one of {known}")


class TargetRows(NamedTuple):
    """Sparse targets of ``N`` tokens, as ``backends/torch/targets.py`` defines them."""

    ids: Tensor
    values: Tensor
    constant: Tensor
    smoothing: Tensor | None = None
    rest: Tensor | None = None

    @property
    def has_rest(self) -> bool:
        """Return whether tokens that are not listed have a probability."""
        return self.smoothing is not None or self.rest is not None

    def at(self, rows: Tensor | slice) -> TargetRows:
        """Return the targets of some tokens."""
        return _with_fields(None if x is None else x[rows] for x in self)

    @staticmethod
    def joined(parts: list[TargetRows]) -> TargetRows:
        """Return the targets of the tokens of all parts."""
        if len(parts) == 1:
            return parts[0]
        fields = zip(*parts, strict=True)
        return _with_fields(None if x[0] is None else torch.cat(x) for x in fields)


def _with_fields(fields: Iterable[Any]) -> TargetRows:
    return TargetRows(*fields)


def target_rows(targets: SparseTargets, vocab_size: int, dtype: torch.dtype) -> TargetRows:
    """Return the targets in the form of the backends. Probabilities are added in float64."""
    size = targets.token_ids.shape[-1]
    ids, p = _merged(
        targets.token_ids.reshape(-1, size).long(), targets.probabilities.reshape(-1, size).double()
    )
    total = p.sum(-1)
    if targets.rest == "renormalize":
        p = p / total[:, None].clamp(min=torch.finfo(dtype).tiny)
    constant = torch.special.xlogy(p, p).sum(-1)
    smoothing = rest = None
    if targets.rest == "ghost":
        # If every token is listed, no other token can have the rest, which is a rounding error.
        rest = (1 - total).clamp(min=0).where((p > 0).sum(-1) < vocab_size, 0.0)
        constant = constant + torch.special.xlogy(rest, rest)
    elif targets.rest == "uniform":
        smoothing = (1 - total).clamp(min=0)
        share = smoothing / vocab_size
        whole = p + share[:, None]
        # Listed entries with a positive probability get ``p + share``. All others get ``share``.
        listed = p > 0
        inside = torch.where(listed, torch.special.xlogy(whole, whole), 0.0).sum(-1)
        others = vocab_size - listed.sum(-1)
        constant = inside + others * torch.special.xlogy(share, share)
    rows = TargetRows(ids, p, constant, smoothing, rest)
    return _with_fields([ids, *(None if x is None else x.to(dtype) for x in rows[1:])])


def _merged(ids: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row by id. The first of equal ids gets the sum of all their probabilities."""
    ids, order = ids.sort(dim=-1, stable=True)
    p = p.gather(-1, order)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = torch.arange(ids.shape[-1], device=ids.device).where(is_first, 0).cummax(-1).values
    return ids, torch.zeros_like(p).scatter_add_(-1, place, p)


def check_alone(
    name: str,
    divergences: Iterable[str],
    teacher_head: object,
    options: LossOptions,
    statistics: object,
    has_lenses: bool = False,
) -> None:
    """Raise an error if sparse targets have a teacher, or a divergence that does not support them.

    The error message calls the option of ``divergences`` ``name``. With ``has_lenses``, lens pairs
    have a teacher, which may have its own temperature.
    """
    given = {
        "teacher_head": teacher_head,
        "teacher_statistics": statistics,
        "teacher_temperature": None if has_lenses else options.teacher_temperature,
    }
    for argument, value in given.items():
        if value is not None:
            raise ValueError(f"{argument} does not apply to SparseTargets: leave it out")
    for divergence in divergences:
        if divergence == Divergence.FORWARD_KL:
            continue
        used = str(Divergence(divergence).value)
        raise ValueError(
            f"{name}={used!r} cannot take SparseTargets: it is not affine in the teacher's"
            " probabilities. A sampled value would be biased: its expectation, and that of its"
            " gradient, differ from those of the whole teacher. And entries that are left out would"
            f" count as 0. Use {name}='forward_kl'"
        )


def sum_is_valid(targets: SparseTargets) -> Tensor:
    """Return whether each listed probability of each token is valid, ``(N, K)``."""
    p = targets.probabilities.reshape(-1, targets.probabilities.shape[-1])
    valid = (p >= 0) & p.isfinite()
    if targets.rest in ("ghost", "uniform"):
        valid = valid & (p.sum(-1, keepdim=True, dtype=torch.float32) <= 1 + TOLERANCE)
    if targets.rest == "renormalize":
        valid = valid & (p.sum(-1, keepdim=True, dtype=torch.float32) > 0)
    return valid
