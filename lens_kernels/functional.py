"""The public operations. Their docstrings are the full reference; modules only point here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lens_kernels import autograd
from lens_kernels import validation as check
from lens_kernels.builder import CallBuilder, Head
from lens_kernels.spec import (
    Divergence,
    Reduction,
    check_kd_ratio,
    check_lens_coeff,
    final_terms,
    parse_name,
)

Hidden = Tensor | Sequence[Tensor]


def symmetric_lens_loss(
    student_hidden: Hidden,
    teacher_hidden: Hidden,
    student_head: Head,
    teacher_head: Head,
    *,
    mask: Tensor | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    layer_weights: Sequence[float] | Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    grad_threshold: float | str | None = None,
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
            pair; float32, bfloat16, float16 or float64. All leading dimensions are equal.
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
            products), ``"reference"`` (dense, float64, for checking), or ``"auto"``: of the first
            two the one for which ``lens_kernels.plan`` says less, ``"triton"`` only on GPUs on
            which ``lens-kernels tune`` has run.
        workspace_bytes: Bound on the tiles of logits held at any time; by default 256 MiB on a CPU,
            1 GiB elsewhere.
        grad_threshold: An approximation, off by default: vocabulary entries at which no logit
            gradient of a chunk exceeds this are left out of both gradient products, unless they are
            so few that all together take less time. The loss is not affected. A logit gradient
            counts by its token's weight relative to the largest one of the call, so that 1e-6 means
            the same at any batch size; a chunk is one of tokens, of the ``triton`` backend one of
            the vocabulary. A fixed threshold leaves out a larger part the nearer the models are.
            ``"bf16"`` does not: it is 2^-9 of the root mean square of the chunk's logit gradients,
            so that what is left out of them is, in the 2-norm, no more than that part, as little as
            rounding them to bfloat16 may change. That bounds the logit gradients; what it makes of
            those of hidden states and head is in ``benchmarks/README.md`` for some models.
            ``distillation_loss`` reports how much was left out.

    Returns:
        In nats, float32 (float64 for float64 heads): a scalar, or ``(L, ...)`` for ``"none"``.

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
    reduce = parse_name(Reduction, "reduction", reduction)
    if reduce is not Reduction.MEAN and denominator is not None:
        raise ValueError(f"denominator only goes with reduction='mean', got {reduction!r}")
    if reduce is Reduction.NONE and layer_weights is not None:
        raise ValueError("layer_weights do not apply to reduction='none', which weighs nothing")
    students = check.hidden_list("student_hidden", student_hidden)
    teachers = check.hidden_list("teacher_hidden", teacher_hidden)
    kind = parse_name(Divergence, "divergence", divergence)
    builder = CallBuilder(students, teachers, [], [], student_head, teacher_head, mask, backend)
    counted = builder.counted()
    weights = check.pair_weights(layer_weights, len(students), builder.device, counted.dtype)
    if reduce is Reduction.MEAN:
        weights = weights / builder.denominator(denominator, counted)
    spec = builder.spec(
        divergences=(kind,) * len(students),
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
        workspace_bytes=workspace_bytes,
        grad_threshold=grad_threshold,
    )
    call = builder.call(spec, row_weight=weights[:, None] * counted)
    loss, rows, _ = autograd.apply(call, builder.backend, deferred=reduce is Reduction.NONE)
    if reduce is Reduction.NONE:
        return builder.finish(rows).reshape(len(students), *builder.shape)
    return builder.finish(loss)


class DistillationOutput(NamedTuple):
    """What ``distillation_loss`` returns: the loss, and its parts in nats per token, detached.

    ``loss = (1 - kd_ratio) ce + kd_ratio (kd + lens_coeff lens)``; ``per_layer`` is ``(L,)``.
    ``dropped`` is the share of the logits' gradient, in absolute sum, that ``grad_threshold`` left
    out.
    """

    loss: Tensor
    ce: Tensor | None
    kd: Tensor
    lens: Tensor | None
    per_layer: Tensor
    num_tokens: Tensor
    dropped: Tensor


def distillation_loss(
    student_hidden: Hidden,
    teacher_hidden: Hidden,
    student_head: Head,
    teacher_head: Head,
    *,
    student_final: Tensor,
    teacher_final: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    kd_ratio: float = 1.0,
    lens_coeff: float = 1.0,
    final_divergence: str | Mapping[str, float] = "reverse_kl",
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    layer_weights: Sequence[float] | Tensor | None = None,
    denominator: float | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    grad_threshold: float | str | None = None,
) -> DistillationOutput:
    """Compute the whole DistillLens objective in one operation, with one head gradient.

    The objective, with the divergences of ``symmetric_lens_loss``::

        (1 - kd_ratio) CE + kd_ratio (D_final + lens_coeff * sum_l w_l D_lens,l)

    Every argument that ``symmetric_lens_loss`` has means the same here. Of the final states alone
    there is also adaptive KL, arXiv 2404.02657::

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
            already. -100 marks positions without one. Cross entropy knows no temperature.
        mask: Tokens that count, for every term; by default those with a label, or all.
        kd_ratio: Weight of distillation against cross entropy, in [0, 1].
        lens_coeff: Weight of the lens term, at least 0.
        final_divergence: What the final hidden states are compared by: a name, ``"akl"`` included,
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
    check_kd_ratio(kd_ratio)
    check_lens_coeff(lens_coeff)
    if labels is None and kd_ratio < 1.0:
        raise ValueError(f"kd_ratio={kd_ratio} gives cross entropy a weight: pass labels")
    students = check.hidden_list("student_hidden", student_hidden, allow_empty=True)
    teachers = check.hidden_list("teacher_hidden", teacher_hidden, allow_empty=True)
    finals = (
        [check.hidden_state("student_final", student_final)],
        [check.hidden_state("teacher_final", teacher_final)],
    )
    lens_kind = parse_name(Divergence, "divergence", divergence)
    terms = final_terms(final_divergence)
    heads = student_head, teacher_head
    builder = CallBuilder(students, teachers, *finals, *heads, mask, backend, len(terms))
    pairs = len(students)
    builder.set_labels(labels, vocab_size, default_mask=mask is None)
    counted, labelled = builder.counted(), builder.labelled()
    weights = check.pair_weights(layer_weights, pairs, builder.device, counted.dtype)
    tokens = builder.denominator(denominator, counted)
    spec = builder.spec(
        divergences=(lens_kind,) * pairs + tuple(terms),
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
        workspace_bytes=workspace_bytes,
        grad_threshold=grad_threshold,
    )
    share = builder.head_share(spec) if any(slope for _, slope in terms.values()) else 0.0
    final_weight = torch.stack([counted * (a + b * share) for a, b in terms.values()])
    row_weight = [
        weights[:, None] * (counted * (kd_ratio * lens_coeff / tokens)),
        final_weight * (kd_ratio / tokens),
    ]
    if labelled is not None:
        label_tokens = builder.denominator(denominator, labelled)
        row_weight.append(labelled[None] * ((1.0 - kd_ratio) / label_tokens))
    call = builder.call(spec, torch.cat(row_weight))
    loss, rows, dropped = autograd.apply(call, builder.backend, deferred=False)
    rows = rows.detach()
    kept = torch.cat([counted.expand(pairs, -1), final_weight])
    means = builder.finish((rows[: len(kept)] * kept).sum(-1) / tokens)
    per_layer = means[:pairs]
    ce = None if labelled is None else (rows[-1] * labelled).sum() / label_tokens
    return DistillationOutput(
        loss=builder.finish(loss),
        ce=None if ce is None else builder.finish(ce),
        kd=means[pairs:].sum(),
        lens=(per_layer * weights.detach()).sum() if pairs else None,
        per_layer=per_layer,
        num_tokens=counted.sum(),
        dropped=dropped,
    )
