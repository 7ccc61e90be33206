"""The result of ``distillation_loss``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DistillationOutput(NamedTuple):
    """The result of ``distillation_loss``: the loss, and its detached parts in nats per token.

    Parts that are not computed are None, except that ``per_layer`` is then empty.

    Attributes:
        loss: ``(1 - kd_ratio) ce + kd_ratio (kd + lens_coeff lens)``, with gradients.
        ce: Cross entropy of the labels.
        kd: Divergence of the final hidden states.
        lens: Weighted sum of the divergences of the lens pairs.
        per_layer: ``(L,)``, the divergence of each lens pair.
        num_tokens: Number of unmasked tokens.
        dropped: Share of the logit gradients, in absolute sum, that ``grad_threshold`` left out.
        clipped: Share of the divergences, over pairs and unmasked tokens, that ``token_clip``
            reduced.
    """

    loss: Tensor
    ce: Tensor | None
    kd: Tensor | None
    lens: Tensor | None
    per_layer: Tensor
    num_tokens: Tensor
    dropped: Tensor
    clipped: Tensor
