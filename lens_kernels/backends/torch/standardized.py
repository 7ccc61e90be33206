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


class Standardized(NamedTuple):
    """Rows of standardised logits ``z'``, with ``z' / T``, and ``1 / (T s)`` of each row."""

    z: Tensor
    logits: Tensor
    scale: Tensor

    @staticmethod
    def of(logits: Tensor, inverse_temperature: Tensor) -> Standardized:
        """Standardise rows of logits, which must be finite."""
        centred = logits - logits.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / max(1, logits.shape[-1] - 1)
        # The mean of equal logits is rounded, so their variance may be above 0.
        varies = logits.amax(-1, keepdim=True) > logits.amin(-1, keepdim=True)
        inverse = torch.where(varies & (variance > 0), variance.rsqrt(), 0.0)
        z = centred * inverse
        return Standardized(z, z * inverse_temperature, inverse * inverse_temperature)

    def backward(
        self, grad: Tensor, ids: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """Return the gradient with respect to ``z`` over ``scale``, without a part at ``ids``.

        The gradient with respect to ``z' / T`` is ``grad`` minus ``values`` at the entries ``ids``.
        """
        product = (grad * self.z).sum(-1, keepdim=True)
        if ids is not None and values is not None:
            product = product - (values * self.z.gather(-1, ids)).sum(-1, keepdim=True)
        return grad - self.z * (product / max(1, self.z.shape[-1] - 1))
