"""Standardised logits: ``z' = (z - mean z) / s``, which are then divided by the temperature.

``s`` is the unbiased standard deviation of a row of logits over the vocabulary. For the gradient
``G`` with respect to ``z' / T``, whose entries sum to 0, the gradient with respect to ``z`` is::

    (G - z' sum_v(G_v z'_v) / (V - 1)) / (T s)

If all logits of a row are equal, ``s`` is 0. Then ``z'`` and the gradient are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """The mean of rows of logits, and ``1 / s`` or 0, ``(R, 1)`` each."""

    mean: Tensor
    inverse: Tensor


class Standardized(NamedTuple):
    """Rows of standardised logits ``z'``, with ``z' / T``, and ``1 / (T s)`` of each row."""

    z: Tensor
    logits: Tensor
    scale: Tensor

    @staticmethod
    def of(
        logits: Tensor, inverse_temperature: Tensor, moments: Moments | None = None
    ) -> Standardized:
        """Standardise rows of logits, which must be finite.

        ``moments`` are those of the whole vocabulary, if ``logits`` are a part of it.
        """
        if moments is None:
            centred = logits - logits.mean(-1, keepdim=True)
            variance = centred.square().sum(-1, keepdim=True) / max(1, logits.shape[-1] - 1)
            # The mean of equal logits is rounded, so their variance may be above 0.
            varies = logits.amax(-1, keepdim=True) > logits.amin(-1, keepdim=True)
            inverse = _inverse_deviation(variance, varies)
        else:
            centred, inverse = logits - moments.mean, moments.inverse
        z = centred * inverse
        return Standardized(z, z * inverse_temperature, inverse * inverse_temperature)

    def backward(self, grad: Tensor, product: Tensor, vocab_size: int) -> Tensor:
        """Return the gradient with respect to ``z`` over ``scale``.

        ``grad`` is the gradient with respect to ``z' / T``, or a part of it. ``product`` ``(R, 1)``
        is the sum of the whole gradient times ``z'`` over the ``vocab_size`` entries.
        """
        return grad - self.z * (product / max(1, vocab_size - 1))


def _inverse_deviation(variance: Tensor, varies: Tensor) -> Tensor:
    return torch.where(varies & (variance > 0), variance.rsqrt(), 0.0)


def part_of_moments(logits: Tensor) -> Tensor:
    """Describe a part of the vocabulary by five numbers for each row, ``(5, R)``.

    They are the number of logits, their mean, their squared deviations from it, and their bounds.
    """
    mean = logits.mean(-1)
    squares = (logits - mean[:, None]).square().sum(-1)
    count = torch.full_like(mean, logits.shape[-1])
    return torch.stack([count, mean, squares, logits.amin(-1), logits.amax(-1)])


def joined_moments(parts: Tensor) -> Moments:
    """Return the moments of the vocabulary from those of its parts, ``(parts, 5, R)``.

    Squares are those of deviations from a mean, because squares of large logits would cancel.
    """
    count, mean, squares, lowest, highest = parts.double().unbind(1)
    size = count.sum(0)
    whole = (count * mean).sum(0) / size
    squares = (squares + count * (mean - whole).square()).sum(0)
    variance = squares / (size - 1).clamp(min=1)
    inverse = _inverse_deviation(variance, highest.amax(0) > lowest.amin(0))
    return Moments(whole.to(parts.dtype)[:, None], inverse.to(parts.dtype)[:, None])
