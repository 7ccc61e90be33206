"""The cross entropy of labels, computed by the operator of the distillation losses."""

from __future__ import annotations

import torch
from torch import Tensor

from lens_kernels import dispatch, operator
from lens_kernels.call import LossCall
from lens_kernels.inputs import Head, check_inputs, model_inputs
from lens_kernels.options import CrossEntropyOptions, Reduction
from lens_kernels.weights import token_denominator


def linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = CrossEntropyOptions.reduction,
    denominator: float | Tensor | None = None,
    label_smoothing: float = CrossEntropyOptions.label_smoothing,
    z_loss: float = CrossEntropyOptions.z_loss,
    ignore_index: int = CrossEntropyOptions.ignore_index,
    return_lse: bool = CrossEntropyOptions.return_lse,
    return_entropy: bool = CrossEntropyOptions.return_entropy,
    vocab_size: int | None = CrossEntropyOptions.vocab_size,
    backend: str = CrossEntropyOptions.backend,
    workspace_bytes: int | None = CrossEntropyOptions.workspace_bytes,
) -> Tensor | tuple[Tensor, ...]:
    """Compute the cross entropy of labels from hidden states, without holding all logits in memory.

    For every token with a label ``y``::

        z = softcap * tanh(scale * (norm(h) @ weight.T + bias) / softcap)
        lse  = log sum_v exp(z_v),  q_v = exp(z_v - lse),  s = label_smoothing
        loss = -(1 - s) log q_y - s mean_v log q_v + z_loss * lse^2

    The hidden states, head weight and bias, and norm weight and bias get gradients if they require
    grad. All are computed with the loss, in three GEMMs.

    Args:
        hidden: ``(..., D)``; float32, bfloat16, float16 or float64. The head's norm is applied to
            it. If it is normed already, as Hugging Face's final states are, pass a head without
            norm.
        head: A ``LensHead``, or a ``(V, D)`` weight, which has no norm and no bias.
        labels: ``(...)``, int64 or int32, already shifted: ``labels[n]`` is the token that position
            ``n`` predicts. ``ignore_index`` marks positions without a label; they are not computed.
        mask: ``(...)``, bool or 0/1: tokens that count, if they have a label.
        reduction: ``"mean"``: the sum divided by ``denominator``; ``"sum"``; or ``"none"``: the
            loss of each token, 0 where masked or without a label.
        denominator: Only with ``"mean"``; by default the number of tokens that count, at least 1.
            Pass the tokens of the whole global batch for gradient accumulation.
        label_smoothing: Share of the target that is spread evenly over the vocabulary, in [0, 1].
        z_loss: Weight of the squared log-sum-exp, at least 0. It keeps logits from growing.
        ignore_index: The label of positions without a label.
        return_lse: Also return ``lse`` of each token, 0 where masked or without a label. It gets no
            gradient.
        return_entropy: Also return the entropy ``-sum_v q_v log q_v`` of each token in nats, 0
            where masked or without a label. It gets no gradient, and is computed with the loss in
            one pass over the logits.
        vocab_size: Number of leading entries that the softmax is taken over, by default all.
        backend: As for ``symmetric_lens_loss``.
        workspace_bytes: As for ``symmetric_lens_loss``.

    Returns:
        The loss in nats, in float32 (float64 for a float64 head): a scalar, or ``(...)`` for
        ``"none"``. With ``return_lse`` or ``return_entropy``, a tuple: the loss, then ``lse``, then
        the entropy. Both reports have shape ``(...)``.

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
    options = CrossEntropyOptions(
        reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss,
        ignore_index=ignore_index, vocab_size=vocab_size, backend=backend,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    options.check_denominator(denominator)
    model = model_inputs("", hidden, head)
    inputs = check_inputs(model, None, options, mask=mask, labels=labels, ignore_index=ignore_index)
    labelled = inputs.labelled()
    assert labelled is not None
    weight = labelled
    if reduction == Reduction.MEAN:
        weight = labelled / token_denominator(denominator, labelled)
    reports = return_lse or return_entropy
    # The reports have no weight, because they are not part of the loss.
    row_weight = torch.cat([weight[None], weight.new_zeros(2 if reports else 0, len(weight))])
    call = LossCall.of(
        inputs, [], options, row_weight, label_smoothing=float(label_smoothing),
        z_loss=float(z_loss), reports=reports, deferred=reduction == Reduction.NONE,
    )  # fmt: skip
    loss, rows, _ = operator.apply(dispatch.with_backend(call, options.backend))
    shape, dtype = inputs.leading_shape, inputs.result_dtype
    if call.deferred:
        loss = (rows[0] * labelled).reshape(shape)
    loss = loss.to(dtype)
    if not reports:
        return loss
    lse, entropy = (row.reshape(shape).to(dtype) for row in (rows[1:] * labelled).detach())
    return (loss, *([lse] if return_lse else []), *([entropy] if return_entropy else []))
