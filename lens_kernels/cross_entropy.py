"""The cross entropy of labels, computed by the operator of the distillation losses."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lens_kernels import dispatch, operator
from lens_kernels.call import LossCall
from lens_kernels.cost import CallShape
from lens_kernels.inputs import Head, check_inputs, model_inputs, token_denominator
from lens_kernels.options import LensOptions, Reduction


def linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = LensOptions.reduction,
    denominator: float | Tensor | None = None,
    vocab_size: int | None = LensOptions.vocab_size,
    backend: str = LensOptions.backend,
    workspace_bytes: int | None = LensOptions.workspace_bytes,
) -> Tensor:
    """Compute the cross entropy of labels from hidden states, without holding all logits in memory.

    For every token with a label ``y``::

        z = softcap * tanh(scale * (norm(h) @ weight.T + bias) / softcap)
        loss = log sum_v exp(z_v) - z_y

    The hidden states, head weight and bias, and norm weight and bias get gradients if they require
    grad. All are computed with the loss, in three GEMMs.

    Args:
        hidden: ``(..., D)``; float32, bfloat16, float16 or float64. The head's norm is applied to
            it. If it is normed already, as Hugging Face's final states are, pass a head without
            norm.
        head: A ``LensHead``, or a ``(V, D)`` weight, which has no norm and no bias.
        labels: ``(...)``, int64 or int32, already shifted: ``labels[n]`` is the token that position
            ``n`` predicts. -100 marks positions without a label; they are not computed.
        mask: ``(...)``, bool or 0/1: tokens that count, if they have a label.
        reduction: ``"mean"``: the sum divided by ``denominator``; ``"sum"``; or ``"none"``: the
            loss of each token, 0 where masked or without a label.
        denominator: Only with ``"mean"``; by default the number of tokens that count, at least 1.
            Pass the tokens of the whole global batch for gradient accumulation.
        vocab_size: Number of leading entries that the softmax is taken over, by default all.
        backend: As for ``symmetric_lens_loss``.
        workspace_bytes: As for ``symmetric_lens_loss``.

    Returns:
        The loss in nats, in float32 (float64 for a float64 head): a scalar, or ``(...)`` for
        ``"none"``.

    Raises:
        TypeError, ValueError, RuntimeError: As for ``symmetric_lens_loss``.

    Example:
        >>> import torch
        >>> from lens_kernels import linear_cross_entropy
        >>> hidden = torch.zeros(2, 3, 8, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, torch.ones(50, 8), torch.zeros(2, 3).long())
        >>> round(loss.item(), 4)  # log 50
        3.912
    """
    options = LensOptions(
        reduction=reduction,
        vocab_size=vocab_size,
        backend=backend,
        workspace_bytes=workspace_bytes,
    )
    options.check_denominator(denominator)
    model = model_inputs("", hidden, head)
    inputs = check_inputs(model, None, mask=mask, labels=labels, vocab_size=vocab_size)
    labelled = inputs.labelled()
    assert labelled is not None
    call = LossCall.of(inputs, [], options, labelled)
    weight = labelled
    if reduction == Reduction.MEAN:
        weight = labelled / token_denominator(denominator, labelled)
    call = replace(
        call,
        normed=(True,),
        row_weight=weight[None],
        backend=dispatch.choose(options.backend, CallShape.of(call)).name,
        deferred=reduction == Reduction.NONE,
    )
    loss, rows, _ = operator.apply(call)
    if call.deferred:
        loss = (rows[0] * labelled).reshape(inputs.leading_shape)
    return loss.to(inputs.result_dtype)
