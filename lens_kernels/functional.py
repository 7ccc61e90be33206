"""The public functions. Their docstrings are the full reference; modules only point here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lens_kernels import adaptive, dispatch, operator
from lens_kernels.call import LossCall, Term
from lens_kernels.cost import CallShape
from lens_kernels.inputs import (
    Head,
    Hidden,
    check_inputs,
    model_inputs,
    pair_weights,
    token_denominator,
)
from lens_kernels.options import (
    DistillationOptions,
    Divergence,
    LensOptions,
    Reduction,
    parse_final_divergence,
)


def symmetric_lens_loss(
    student_hidden: Hidden,
    teacher_hidden: Hidden,
    student_head: Head,
    teacher_head: Head,
    *,
    mask: Tensor | None = None,
    divergence: str = LensOptions.divergence,
    beta: float = LensOptions.beta,
    temperature: float = LensOptions.temperature,
    layer_weights: Sequence[float] | Tensor | None = LensOptions.layer_weights,
    reduction: str = LensOptions.reduction,
    denominator: float | Tensor | None = None,
    vocab_size: int | None = LensOptions.vocab_size,
    backend: str = LensOptions.backend,
    workspace_bytes: int | None = LensOptions.workspace_bytes,
    grad_threshold: float | str | None = LensOptions.grad_threshold,
) -> Tensor:
    """Compare student and teacher through their logit lenses, without ever holding the logits.

    For every lens pair and token, with ``p`` and ``q`` the teacher's and the student's lens::

        z = softcap * tanh(scale * (norm(h) @ weight.T + bias) / softcap) / temperature
        p = softmax(z_teacher),  q = softmax(z_student),  m = beta p + (1 - beta) q

        jsd         beta KL(p, m) + (1 - beta) KL(q, m)        at most ln 2
        jeffreys    KL(p, q) + KL(q, p)
        forward_kl  KL(p, q), the teacher's view
        reverse_kl  KL(q, p), the student's view
        tvd         sum |p - q| / 2                            at most 1
        hellinger   sum (sqrt p - sqrt q)^2 / 2, squared       at most 1

    No factor of temperature squared is applied. Gradients reach the student's hidden states and its
    head's weight, bias, norm weight and norm bias, each if it requires grad; the teacher gets none.
    The objective is that of DistillLens, arXiv 2602.13567.

    Args:
        student_hidden: ``(..., D_s)`` for one lens pair, or a list of such tensors, one for each
            pair; float32, bfloat16, float16 or float64. All leading dimensions are equal. Their
            dtype may differ from the head's, but both are float64 or neither is.
        teacher_hidden: Likewise ``(..., D_t)``, paired with ``student_hidden`` in order.
        student_head: A ``LensHead``, or a ``(V, D_s)`` weight, which has no norm and no bias.
        teacher_head: Likewise with ``D_t``.
        mask: ``(...)``, bool or 0/1, shared by all pairs; True tokens count. Others are not
            computed, whatever they hold. On a GPU a mask costs one synchronisation.
        divergence: One of the names above.
        beta: Weight of the teacher in ``m``, in the open interval (0, 1). Only ``jsd`` uses it.
        temperature: Divides both models' logits; above 0.
        layer_weights: ``w_l``, one number for each pair, by default ``1 / L``.
        reduction: ``"mean"``: ``sum_l w_l sum_n mask_n loss_ln / denominator``; ``"sum"``: the same
            undivided; ``"none"``: ``loss_ln`` for each pair and token, 0 where masked.
        denominator: Only with ``"mean"``; by default the number of unmasked tokens of this call, at
            least 1. Pass the tokens of the whole global batch to make gradient accumulation and
            data parallelism exact.
        vocab_size: Number of leading entries that both vocabularies share, over which both
            softmaxes are then taken. Needed only if the vocabularies differ in size.
        backend: ``"torch"``, ``"triton"`` (NVIDIA and AMD GPUs; no tile of logits in memory, more
            products), or ``"auto"``: the one that ``lens_kernels.plan`` estimates to be cheaper.
            ``"auto"`` takes ``"triton"`` only on GPUs on which ``lens-kernels tune`` has run.
        workspace_bytes: Bound on the tiles of logits held at any time; by default 256 MiB on a CPU,
            1 GiB elsewhere.
        grad_threshold: An approximation, off by default. Vocabulary entries whose logit gradients
            are at most this, for all tokens of a chunk, are left out of both gradient products. If
            they are few, all products are made, which takes less time. The loss is not affected. A
            logit gradient is the one with respect to ``z`` above, times the derivative of the
            softcap. It counts with its token's weight relative to the largest weight of the call,
            so 1e-6 means the same at any batch size, scale and temperature. The ``torch`` backend
            takes chunks of tokens, ``triton`` takes chunks of the vocabulary. A fixed threshold
            leaves out more, the nearer the models are. ``"bf16"`` adapts: it is 2^-9 of the root
            mean square of the chunk's logit gradients. The part left out of them is then at most
            2^-9 in the 2-norm, which is what rounding to bfloat16 may change.
            ``docs/memory_and_speed.md`` has the effect on gradients of hidden states and head, for
            some models. ``distillation_loss`` reports how much was left out.

    Returns:
        In nats, float32 (float64 for float64 heads): a scalar, or ``(L, ...)`` for ``"none"``. A
        KL divergence is ``inf`` if a logit of -inf takes all mass from an entry where the other
        distribution has some. If that is the teacher's logit, gradients are not finite either.

    Raises:
        TypeError: A dtype or kind of argument that is not supported.
        ValueError: A shape, device, name or value that does not fit, before any work is done.
        RuntimeError: The backend asked for cannot serve these tensors.

    Logits, and all arithmetic on them, are in float32 whatever the inputs' dtype. Where a device
    multiplies 16-bit matrices into float32 (CUDA; bfloat16 on a CPU with AMX, if torch can tell)
    the factors of a 16-bit head's products are rounded to its dtype: normed hidden states, and the
    logits' gradients. Results are the same bit for bit from run to run on one machine, except where
    the device's own matrix products are not.

    Example:
        >>> import torch
        >>> from lens_kernels import symmetric_lens_loss
        >>> student = torch.zeros(2, 3, 8, requires_grad=True)
        >>> teacher = torch.zeros(2, 3, 16)
        >>> loss = symmetric_lens_loss(student, teacher, torch.ones(50, 8), torch.ones(50, 16))
        >>> loss.backward()
        >>> loss.item(), student.grad.abs().max().item()
        (0.0, 0.0)
    """
    options = LensOptions(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        layer_weights=layer_weights,
        reduction=reduction,
        vocab_size=vocab_size,
        backend=backend,
        workspace_bytes=workspace_bytes,
        grad_threshold=grad_threshold,
    )
    if reduction != Reduction.MEAN and denominator is not None:
        raise ValueError(f"denominator only goes with reduction='mean', got {reduction!r}")
    student = model_inputs("student", student_hidden, student_head)
    teacher = model_inputs("teacher", teacher_hidden, teacher_head)
    inputs = check_inputs(student, teacher, mask=mask, vocab_size=vocab_size)
    terms = [Term(Divergence(divergence), i) for i in range(student.lenses)]
    counted = inputs.counted()
    call = LossCall.of(inputs, terms, options, counted)
    backend = dispatch.choose(options.backend, CallShape.of(call)).name
    weights = pair_weights(layer_weights, student.lenses, inputs)
    if reduction == Reduction.MEAN:
        weights = weights / token_denominator(denominator, counted)
    call = replace(call, row_weight=weights[:, None] * counted)
    loss, rows, _ = operator.apply(call, backend, deferred=reduction == Reduction.NONE)
    if reduction == Reduction.NONE:
        loss = rows.reshape(student.lenses, *inputs.leading_shape)
    return loss.to(inputs.result_dtype)


class DistillationOutput(NamedTuple):
    """The result of ``distillation_loss``: the loss, and its parts in nats per token, detached.

    ``loss = (1 - kd_ratio) ce + kd_ratio (kd + lens_coeff lens)``; ``per_layer`` is ``(L,)``. Parts
    that are not computed are None, and ``per_layer`` is then empty. ``dropped`` is the share of the
    logits' gradient, in absolute sum, that ``grad_threshold`` left out.
    """

    loss: Tensor
    ce: Tensor | None
    kd: Tensor | None
    lens: Tensor | None
    per_layer: Tensor
    num_tokens: Tensor
    dropped: Tensor


def distillation_loss(
    student_hidden: Hidden,
    teacher_hidden: Hidden | None,
    student_head: Head,
    teacher_head: Head | None,
    *,
    student_final: Tensor,
    teacher_final: Tensor | None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    kd_ratio: float = DistillationOptions.kd_ratio,
    lens_coeff: float = DistillationOptions.lens_coeff,
    final_divergence: str | Mapping[str, float] = DistillationOptions.final_divergence,
    divergence: str = DistillationOptions.divergence,
    beta: float = DistillationOptions.beta,
    temperature: float = DistillationOptions.temperature,
    layer_weights: Sequence[float] | Tensor | None = DistillationOptions.layer_weights,
    denominator: float | Tensor | None = None,
    vocab_size: int | None = DistillationOptions.vocab_size,
    backend: str = DistillationOptions.backend,
    workspace_bytes: int | None = DistillationOptions.workspace_bytes,
    grad_threshold: float | str | None = DistillationOptions.grad_threshold,
) -> DistillationOutput:
    """Compute the whole DistillLens objective in one operation, with one head gradient.

    The objective, with the divergences of ``symmetric_lens_loss``::

        (1 - kd_ratio) CE + kd_ratio (D_final + lens_coeff * sum_l w_l D_lens,l)

    Arguments that ``symmetric_lens_loss`` has too mean the same here. The final states may also be
    compared by the adaptive KL, arXiv 2404.02657::

        akl         share KL(p, q) + (1 - share) KL(q, p),  share = gap_head / (gap_head + gap_tail)

    where a gap is ``sum |p - q|`` over the head or the tail of the vocabulary, and the share is a
    constant to the gradient, 1/2 where ``p == q``. The head is the longest run of entries, those
    that the teacher finds most probable first, with no more than half of its mass: the entry that
    goes beyond one half is of the tail, unless it is the first. That is the rule of the paper's
    published code and of DistillLens's (arXiv 2602.13567). It costs both KLs, and for the share one
    more projection of both models and a sort, in tiles that ``workspace_bytes`` bounds.

    Args:
        student_hidden: Intermediate hidden states, one for each lens pair, read through the head's
            norm. An empty list (for both models) leaves the lens term out.
        teacher_hidden: Likewise.
        student_head: The student's head.
        teacher_head: The teacher's head.
        student_final: ``(..., D_s)``, the hidden state that the model itself projects. It is read
            without the norm: Hugging Face returns it normed already.
        teacher_final: Likewise ``(..., D_t)``.
        labels: ``(...)``, ``labels[n]`` being the token that position ``n`` predicts: shifted
            already. -100 marks positions without one. The temperature does not apply to cross
            entropy.
        mask: Tokens that count, for every term; by default those with a label, or all.
        kd_ratio: Weight of distillation against cross entropy, in [0, 1]. At 0 only cross entropy
            is computed: the teacher's arguments may be None, and no lens is read.
        lens_coeff: Weight of the lens term, at least 0.
        final_divergence: How the final hidden states are compared: a name, which may be ``"akl"``,
            or a mapping of names to weights, each at least 0 and one above it. ``D_final`` is then
            the weighted sum, as in ``{"forward_kl": 0.5, "reverse_kl": 1.0}``; each further name
            with a weight above 0 costs one further pair of hidden states.
        divergence: The divergence of the lens pairs.
        beta: Weight of the teacher wherever a divergence is ``jsd``.
        temperature: Divides the logits of both divergences.
        layer_weights: ``w_l``, by default ``1 / L``.
        denominator: By default the number of unmasked tokens, and for cross entropy of labelled
            ones.
        vocab_size: The shared vocabulary prefix, over which cross entropy is taken too.
        backend: As for ``symmetric_lens_loss``.
        workspace_bytes: As for ``symmetric_lens_loss``.
        grad_threshold: As for ``symmetric_lens_loss``; see ``dropped`` of the result.

    Returns:
        A ``DistillationOutput``; only its ``loss`` carries gradients.

    Raises:
        TypeError, ValueError, RuntimeError: As for ``symmetric_lens_loss``.
    """
    options = DistillationOptions(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        layer_weights=layer_weights,
        vocab_size=vocab_size,
        backend=backend,
        workspace_bytes=workspace_bytes,
        grad_threshold=grad_threshold,
        kd_ratio=kd_ratio,
        lens_coeff=lens_coeff,
        final_divergence=final_divergence,
    )
    if labels is None and kd_ratio < 1.0:
        raise ValueError(f"kd_ratio={kd_ratio} gives cross entropy a weight: pass labels")
    student = model_inputs("student", student_hidden, student_head, student_final, has_final=True)
    teacher, pairs = None, 0
    terms: list[Term] = []
    finals: dict[Divergence, tuple[float, float]] = {}
    if kd_ratio > 0.0:
        teacher = model_inputs(
            "teacher", teacher_hidden, teacher_head, teacher_final, has_final=True
        )
        pairs = student.lenses
        finals = parse_final_divergence("final_divergence", final_divergence)
        terms = [Term(Divergence(divergence), i) for i in range(pairs)]
        terms += [Term(kind, -1) for kind in finals]
    inputs = check_inputs(student, teacher, mask=mask, labels=labels, vocab_size=vocab_size)
    counted, labelled = inputs.counted(), inputs.labelled()
    call = LossCall.of(inputs, terms, options, counted)
    backend = dispatch.choose(options.backend, CallShape.of(call)).name
    tokens = token_denominator(denominator, counted)
    layer = pair_weights(layer_weights, student.lenses, inputs)[:pairs]
    share = adaptive.head_share(call) if any(slope for _, slope in finals.values()) else 0.0
    # Weights of the rows inside their own term of the objective, then in the loss.
    lens_rows = counted.expand(pairs, -1)
    final_rows = [counted * (constant + slope * share) for constant, slope in finals.values()]
    row_weight = [
        layer[:, None] * (lens_rows * (kd_ratio * lens_coeff / tokens)),
        *(weight[None] * (kd_ratio / tokens) for weight in final_rows),
    ]
    if labelled is not None:
        label_tokens = token_denominator(denominator, labelled)
        row_weight.append(labelled[None] * ((1.0 - kd_ratio) / label_tokens))
    call = replace(call, row_weight=torch.cat(row_weight))
    loss, rows, dropped = operator.apply(call, backend, deferred=False)
    rows = rows.detach()

    def mean(values: Tensor, denominator: Tensor | float) -> Tensor:
        return (values.sum(-1) / denominator).to(inputs.result_dtype)

    per_layer = mean(rows[:pairs] * lens_rows, tokens)
    kd = None
    if final_rows:
        kd = mean(rows[pairs : len(terms)] * torch.stack(final_rows), tokens).sum()
    return DistillationOutput(
        loss=loss.to(inputs.result_dtype),
        ce=None if labelled is None else mean(rows[-1] * labelled, label_tokens),
        kd=kd,
        lens=(per_layer * layer.detach()).sum() if pairs else None,
        per_layer=per_layer,
        num_tokens=counted.sum(),
        dropped=dropped,
    )
