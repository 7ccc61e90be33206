"""The public functions. Their docstrings are the full reference of all options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lens_kernels import adaptive, dispatch, operator
from lens_kernels.call import LossCall, Term
from lens_kernels.inputs import Head, Hidden, check_inputs, model_inputs
from lens_kernels.options import (
    DistillationOptions,
    Divergence,
    LensOptions,
    Reduction,
    parse_final_divergence,
)
from lens_kernels.output import DistillationOutput
from lens_kernels.targets import SparseTargets, check_alone
from lens_kernels.weights import given_statistics, pair_weights, token_denominator


def symmetric_lens_loss(
    student_hidden: Hidden,
    teacher_hidden: Hidden | SparseTargets,
    student_head: Head,
    teacher_head: Head | Sequence[Head] | None,
    *,
    mask: Tensor | None = None,
    divergence: str = LensOptions.divergence,
    beta: float = LensOptions.beta,
    temperature: float = LensOptions.temperature,
    teacher_temperature: float | None = LensOptions.teacher_temperature,
    temperature_squared: bool = LensOptions.temperature_squared,
    standardize: bool = False,
    token_clip: float | None = LensOptions.token_clip,
    layer_weights: Sequence[float] | Tensor | None = LensOptions.layer_weights,
    reduction: str = LensOptions.reduction,
    denominator: float | Tensor | None = None,
    vocab_size: int | None = LensOptions.vocab_size,
    backend: str = LensOptions.backend,
    workspace_bytes: int | None = LensOptions.workspace_bytes,
    grad_threshold: float | str | None = LensOptions.grad_threshold,
    teacher_statistics: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """Compare student and teacher through their logit lenses, without holding all logits in memory.

    For every lens pair and token, ``p`` is the teacher's distribution and ``q`` the student's::

        z = softcap * tanh(scale * (norm(h) @ weight.T + bias) / softcap) / temperature
        p = softmax(z_teacher),  q = softmax(z_student),  m = beta p + (1 - beta) q

        jsd         beta KL(p, m) + (1 - beta) KL(q, m)        at most ln 2
        jeffreys    KL(p, q) + KL(q, p)
        forward_kl  KL(p, q), expected under the teacher
        reverse_kl  KL(q, p), expected under the student
        tvd         sum |p - q| / 2                            at most 1
        hellinger   sum (sqrt p - sqrt q)^2 / 2                at most 1 (the squared distance)

    By default the loss is not multiplied by the temperature squared. The student's hidden states,
    head weight and bias, and norm weight and bias get gradients if they require grad. The teacher
    gets none. The objective is that of DistillLens, arXiv 2602.13567.

    Args:
        student_hidden: ``(..., D_s)`` for one lens pair, or a list of such tensors, one for each
            pair; float32, bfloat16, float16 or float64. All leading dimensions must be equal. The
            dtype may differ from the head's, but both must be float64 or neither.
        teacher_hidden: The same with ``(..., D_t)``, in the order of ``student_hidden``. Or
            ``SparseTargets``, for ``forward_kl`` only: then every pair is compared with these
            probabilities, at the cost of three GEMMs instead of four.
        student_head: A ``LensHead``, or a ``(V, D_s)`` weight, which has no norm and no bias.
        teacher_head: The same with ``D_t``, or None with ``SparseTargets``. Or a list with a head
            for each pair, for several teachers, whose ``D_t`` may differ.
        mask: ``(...)``, bool or 0/1, shared by all pairs. Tokens with True count. The others are
            not computed, and may hold any value. On a GPU a mask costs one synchronisation.
        divergence: One of the names above.
        beta: Weight of the teacher in ``m``, in the open interval (0, 1). Only ``jsd`` uses it.
        temperature: Divides both models' logits. Must be above 0.
        teacher_temperature: Divides the teacher's logits instead, if it is given.
        temperature_squared: Multiply the loss by ``temperature`` squared, as Hinton et al. do.
        standardize: Replace each model's logits ``z`` of a token, before the temperature, by ``(z -
            mean z) / std z`` over the shared vocabulary, with the unbiased deviation (CVPR 2024,
            arXiv 2403.01427). The logits must be finite.
        token_clip: Upper bound of each token's divergence, in nats. A token above it gets no
            gradient. ``distillation_loss`` reports the clipped share.
        layer_weights: ``w_l``, one number for each pair, by default ``1 / L``.
        reduction: ``"mean"``: ``sum_l w_l sum_n mask_n loss_ln / denominator``; ``"sum"``: the same
            without the division; ``"none"``: ``loss_ln`` for each pair and token, 0 where masked.
        denominator: Only with ``"mean"``; by default the number of unmasked tokens of this call, at
            least 1. Pass the tokens of the whole global batch to make gradient accumulation and
            data parallelism exact.
        vocab_size: Number of leading entries that both vocabularies share. Both softmaxes are taken
            over these. Needed only if the vocabularies differ in size.
        backend: ``"torch"``, ``"triton"`` (for NVIDIA and AMD GPUs; it keeps no logits in memory,
            but needs more GEMMs), or ``"auto"``: whichever ``lens_kernels.plan`` estimates to be
            cheaper. ``"auto"`` takes ``"triton"`` only on GPUs where ``lens-kernels tune`` has run.
        workspace_bytes: Limit for the bytes of all tiles of logits in memory. The default is 256
            MiB on a CPU, 1 GiB elsewhere.
        grad_threshold: An approximation, off by default. A vocabulary entry is left out of both
            gradient GEMMs if its logit gradients are at most this large for all tokens of a chunk.
            If only few entries qualify, none are left out, because that takes less time. The loss
            is not affected. Logit gradients are derivatives with respect to ``z``, times the
            derivative of the softcap. Each is multiplied by its token's weight, relative to the
            largest weight of the call. So 1e-6 means the same at any batch size, scale and
            temperature. The ``torch`` backend works on chunks of tokens, ``triton`` on chunks of
            the vocabulary. A fixed threshold leaves out more as the models become more similar.
            ``"bf16"`` adapts: it is 2^-9 times the root mean square of the chunk's logit gradients.
            The part left out then has at most 2^-9 of their 2-norm, as much as rounding to bfloat16
            may change. ``docs/memory_and_speed.md`` shows the effect on gradients for some models.
            ``distillation_loss`` reports how much was left out.
        teacher_statistics: The log-sum-exps of the teacher's logits ``z_teacher``, if they are
            known: ``(L, ..., 2)`` in float32 or float64, with ``maximum`` and ``log sum exp(z -
            maximum)`` of each pair and token, over the shared vocabulary and at this temperature,
            and with ``standardize`` those of the standardised logits.
            They are trusted, and the teacher's softmax is not normalised again. With ``jsd``,
            ``tvd`` and ``hellinger`` that saves work on GPUs: the first reading of the teacher's
            logits, or in ``triton`` one of its projections. The other divergences read these logits
            anyway.
        process_group: A ``torch.distributed`` process group over which the vocabulary is spread.
            Each rank passes the same arguments, but only its contiguous slice of the rows of both
            heads, in rank order, cut at the same entries. The slices may differ in size. All ranks
            get the same loss and the same gradients of hidden states and norm, and each gets the
            gradient of its own rows of the head. Heads may be DTensors with ``Shard(0)`` on the
            group's mesh. ``vocab_size``, ``labels`` and ``SparseTargets`` refer to the whole
            vocabulary. Every rank must call the function and its backward pass. Only the ``torch``
            backend supports it. See ``docs/scale.md``.

    Returns:
        The loss in nats, in float32 (float64 for float64 heads): a scalar, or ``(L, ...)`` for
        ``"none"``. A KL divergence is ``inf`` if its second distribution has a logit of -inf where
        the first has mass. If this is a logit of the teacher, gradients are not finite either.

    Raises:
        TypeError: An argument has an unsupported type or dtype.
        ValueError: A shape, device, name or value is invalid. Raised before any computation.
        RuntimeError: The requested backend does not support these tensors.

    Logits, and all arithmetic on them, are in float32, or in float64 for float64 heads. Some
    devices can multiply 16-bit matrices with a float32 result: CUDA GPUs, and CPUs with AMX for
    bfloat16 if torch reports it. On these devices, normed hidden states and logit gradients are
    rounded to the dtype of a 16-bit head before its GEMMs. Results are bitwise reproducible on one
    machine if the device's own GEMMs are.

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
        divergence=divergence, beta=beta, temperature=temperature,
        teacher_temperature=teacher_temperature, temperature_squared=temperature_squared,
        standardize=standardize, token_clip=token_clip, layer_weights=layer_weights,
        reduction=reduction, vocab_size=vocab_size, backend=backend,
        workspace_bytes=workspace_bytes, grad_threshold=grad_threshold,
    )  # fmt: skip
    options.check_denominator(denominator)
    model = partial(model_inputs, process_group=process_group)
    student = model("student", student_hidden, student_head)
    teacher = targets = None
    if isinstance(teacher_hidden, SparseTargets):
        targets = teacher_hidden
        check_alone("divergence", [divergence], teacher_head, options, teacher_statistics)
    else:
        teacher = model("teacher", teacher_hidden, teacher_head)
    inputs = check_inputs(
        student, teacher, options, mask=mask, targets=targets, process_group=process_group
    )
    counted = inputs.counted()
    statistics = given_statistics(teacher_statistics, inputs)
    weights = pair_weights(layer_weights, student.lenses, inputs) * options.factor
    if reduction == Reduction.MEAN:
        weights = weights / token_denominator(denominator, counted)
    terms = [Term(Divergence(divergence), i) for i in range(student.lenses)]
    row_weight, deferred = weights[:, None] * counted, reduction == Reduction.NONE
    call = LossCall.of(inputs, terms, options, row_weight, statistics, deferred=deferred)
    loss, rows, _ = operator.apply(dispatch.with_backend(call, options.backend))
    if deferred:
        loss = rows.reshape(student.lenses, *inputs.leading_shape) * options.factor
    return loss.to(inputs.result_dtype)


def distillation_loss(
    student_hidden: Hidden,
    teacher_hidden: Hidden | None,
    student_head: Head,
    teacher_head: Head | Sequence[Head] | None,
    *,
    student_final: Tensor,
    teacher_final: Tensor | SparseTargets | None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    kd_ratio: float = DistillationOptions.kd_ratio,
    lens_coeff: float = DistillationOptions.lens_coeff,
    final_divergence: str | Mapping[str, float] = DistillationOptions.final_divergence,
    divergence: str = DistillationOptions.divergence,
    beta: float = DistillationOptions.beta,
    temperature: float = DistillationOptions.temperature,
    teacher_temperature: float | None = DistillationOptions.teacher_temperature,
    temperature_squared: bool = DistillationOptions.temperature_squared,
    standardize: bool | str = DistillationOptions.standardize,
    token_clip: float | None = DistillationOptions.token_clip,
    layer_weights: Sequence[float] | Tensor | None = DistillationOptions.layer_weights,
    denominator: float | Tensor | None = None,
    vocab_size: int | None = DistillationOptions.vocab_size,
    backend: str = DistillationOptions.backend,
    workspace_bytes: int | None = DistillationOptions.workspace_bytes,
    grad_threshold: float | str | None = DistillationOptions.grad_threshold,
    teacher_statistics: Tensor | None = None,
    process_group: Any = None,
) -> DistillationOutput:
    """Compute the whole DistillLens objective in one operation, with one head gradient.

    The objective, with the divergences of ``symmetric_lens_loss``::

        (1 - kd_ratio) CE + kd_ratio (D_final + lens_coeff * sum_l w_l D_lens,l)

    Arguments of ``symmetric_lens_loss`` have the same meaning here. The final hidden states can
    also be compared by the adaptive KL, arXiv 2404.02657::

        akl         share KL(p, q) + (1 - share) KL(q, p),  share = gap_head / (gap_head + gap_tail)

    A gap is ``sum |p - q|`` over the head or the tail of the vocabulary. The gradient treats the
    share as a constant. The share is 1/2 where ``p == q``. With entries sorted by the teacher's
    probability, the head is the longest leading part that holds at most half of the mass. The entry
    that crosses one half belongs to the tail, unless it is the first. The published code of the
    paper and of DistillLens has the same rule. The adaptive KL costs as much as both KLs. The share
    also costs one more projection of both models and a search for the largest probabilities, in
    tiles within ``workspace_bytes``.

    Args:
        student_hidden: Intermediate hidden states, one for each lens pair. The head's norm is
            applied to them. Pass empty lists for both models to compute no lens term.
        teacher_hidden: The same for the teacher.
        student_head: The student's head.
        teacher_head: The teacher's head. Or a list with a head for each pair and, at the end, one
            for ``teacher_final``, unless that is ``SparseTargets``.
        student_final: ``(..., D_s)``, the final hidden state. The norm is not applied to it,
            because Hugging Face returns it already normed.
        teacher_final: The same with ``(..., D_t)``. Or ``SparseTargets``, for ``forward_kl`` only.
            Lens pairs then still need a teacher's hidden states and ``teacher_head``, and the
            targets may be those of another teacher. Without lens pairs, ``teacher_head`` is None.
        labels: ``(...)``, already shifted: ``labels[n]`` is the token that position ``n`` predicts.
            -100 marks positions without a label. Cross entropy ignores the temperature.
        mask: Tokens that count in every term. By default tokens with a label count. Without labels
            all tokens count.
        kd_ratio: Weight of distillation against cross entropy, in [0, 1]. At 0 only cross entropy
            is computed: the teacher's arguments may be None, and no lens is computed.
        lens_coeff: Weight of the lens term, at least 0.
        final_divergence: The divergence of the final hidden states: a name, which may be ``"akl"``,
            or a mapping of names to weights, at least 0 and not all 0. With a mapping, ``D_final``
            is the weighted sum, as in ``{"forward_kl": 0.5, "reverse_kl": 1.0}``. Each further name
            with a weight above 0 costs as much as another pair of hidden states.
        divergence: The divergence of the lens pairs.
        beta: Weight of the teacher in every ``jsd``.
        temperature: Divides the logits in ``D_final`` and ``D_lens``, but not in cross entropy.
        teacher_temperature: As for ``symmetric_lens_loss``.
        temperature_squared: Multiply ``D_final`` and ``D_lens`` by ``temperature`` squared.
        standardize: Standardise the logits, as for ``symmetric_lens_loss``, in ``D_final`` and
            ``D_lens``, or with ``"lens"`` in ``D_lens`` only. Cross entropy uses the logits as they
            are.
        token_clip: As for ``symmetric_lens_loss``; see ``clipped`` of the result.
        layer_weights: ``w_l``, by default ``1 / L``.
        denominator: Divides the sums over tokens. By default it is the number of unmasked tokens;
            for cross entropy, the number of unmasked tokens with a label.
        vocab_size: Size of the shared vocabulary prefix. Cross entropy uses it too.
        backend: As for ``symmetric_lens_loss``.
        workspace_bytes: As for ``symmetric_lens_loss``.
        grad_threshold: As for ``symmetric_lens_loss``; see ``dropped`` of the result.
        teacher_statistics: As for ``symmetric_lens_loss``, ``(L + 1, ..., 2)``: those of the final
            hidden state come last.
        process_group: As for ``symmetric_lens_loss``.

    Returns:
        A ``DistillationOutput``; only its ``loss`` carries gradients.

    Raises:
        TypeError, ValueError, RuntimeError: As for ``symmetric_lens_loss``.
    """
    options = DistillationOptions(
        divergence=divergence, beta=beta, temperature=temperature,
        teacher_temperature=teacher_temperature, temperature_squared=temperature_squared,
        standardize=standardize, token_clip=token_clip, layer_weights=layer_weights,
        vocab_size=vocab_size, backend=backend, workspace_bytes=workspace_bytes,
        grad_threshold=grad_threshold, kd_ratio=kd_ratio, lens_coeff=lens_coeff,
        final_divergence=final_divergence,
    )  # fmt: skip
    if labels is None and kd_ratio < 1.0:
        raise ValueError(f"kd_ratio={kd_ratio} is below 1 and needs cross entropy: pass labels")
    model = partial(model_inputs, process_group=process_group)
    student = model("student", student_hidden, student_head, student_final)
    finals: dict[Divergence, tuple[float, float]] = {}
    if kd_ratio > 0.0:
        finals = parse_final_divergence("final_divergence", final_divergence)
    pairs = student.lenses if finals else 0
    teacher = targets = None
    if finals and isinstance(teacher_final, SparseTargets):
        targets = teacher_final
        has_states = isinstance(teacher_hidden, Tensor) or bool(teacher_hidden)
        if has_states != (pairs > 0) or (pairs and teacher_head is None):
            raise ValueError(
                "teacher_final is SparseTargets, so lens pairs need the hidden states and the head"
                " of a teacher: pass teacher_hidden and teacher_head, or for no lens pairs"
                " student_hidden=[], teacher_hidden=[] and teacher_head=None"
            )
        check_alone(
            "final_divergence", finals, None if pairs else teacher_head, options,
            teacher_statistics, has_lenses=pairs > 0,
        )  # fmt: skip
        if pairs:
            teacher = model("teacher", teacher_hidden, teacher_head)
    elif finals:
        teacher = model("teacher", teacher_hidden, teacher_head, teacher_final)
    terms = [Term(Divergence(divergence), i) for i in range(pairs)]
    terms += [Term(kind, -1) for kind in finals]
    inputs = check_inputs(
        student, teacher, options, mask=mask, labels=labels, targets=targets,
        process_group=process_group,
    )  # fmt: skip
    counted, labelled = inputs.counted(), inputs.labelled()
    statistics = given_statistics(teacher_statistics, inputs)
    tokens = token_denominator(denominator, counted)
    layer = pair_weights(layer_weights, student.lenses, inputs)[:pairs]
    call = LossCall.of(inputs, terms, options, counted, statistics)
    call = dispatch.with_backend(call, options.backend)
    is_adaptive = any(slope for _, slope in finals.values())
    if is_adaptive and standardize is True:
        raise ValueError("akl is not available with standardize=True: use standardize='lens'")
    share = adaptive.head_share(call) if is_adaptive else 0.0
    # A token's weights within each loss term. ``row_weight`` has its weights within the whole loss.
    factor = options.factor
    lens_rows = (counted * factor).expand(pairs, -1)
    final_rows = [
        counted * ((constant + slope * share) * factor) for constant, slope in finals.values()
    ]
    row_weight = [
        layer[:, None] * (lens_rows * (kd_ratio * lens_coeff / tokens)),
        *(weight[None] * (kd_ratio / tokens) for weight in final_rows),
    ]
    if labelled is not None:
        label_tokens = token_denominator(denominator, labelled)
        row_weight.append(labelled[None] * ((1.0 - kd_ratio) / label_tokens))
    loss, rows, dropped = operator.apply(replace(call, row_weight=torch.cat(row_weight)))
    rows = rows.detach()

    def mean(values: Tensor, denominator: Tensor | float) -> Tensor:
        return (values.sum(-1) / denominator).to(inputs.result_dtype)

    per_layer = mean(rows[:pairs] * lens_rows, tokens)
    kd, clipped = None, torch.zeros_like(dropped)
    if token_clip is not None and terms:
        above = (rows[: len(terms)] >= token_clip) * counted
        clipped = above.sum() / (counted.sum().clamp(min=1) * len(terms))
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
        clipped=clipped,
    )
