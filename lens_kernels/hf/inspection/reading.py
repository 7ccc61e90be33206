"""Applies the logit lens to a text at every depth of a model, and compares two models' lenses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lens_kernels.functional import symmetric_lens_loss
from lens_kernels.hf.model.anatomy import blocks_of, lens_head_from, verify_lens
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.layers import check_layers
from lens_kernels.hf.model.state import evaluating, without_autocast
from lens_kernels.hf.training.checks import Limits
from lens_kernels.hf.training.data import check_count
from lens_kernels.lens import LensHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pairs = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Reading:
    """The lens's predictions of the next token, at every depth and after each token of a text.

    Row ``i - 1`` of a tensor belongs to depth ``i``, the output of block ``i``. The last row is the
    model's own output.

    Attributes:
        head: The head that reads the hidden states.
        hidden: The hidden states of each depth, ``(N, D)``. The list is emptied after comparisons.
        top_ids: ``(L, N, k)``, the most likely next tokens.
        top_probs: ``(L, N, k)``, the probabilities of these tokens.
        entropy: ``(L, N)``, the entropy of each prediction in nats.
        final_kl: ``(L, N)``, KL(model's output || prediction at this depth), in nats.
        next_prob: ``(L, N - 1)``, the probability of the text's next token.
        next_rank: ``(L, N - 1)``, the rank of the text's next token; 1 is the most likely token.
    """

    head: LensHead
    hidden: list[Tensor]
    top_ids: Tensor
    top_probs: Tensor
    entropy: Tensor
    final_kl: Tensor
    next_prob: Tensor
    next_rank: Tensor

    @property
    def depths(self) -> int:
        """The number of blocks of the model."""
        return self.entropy.shape[0]

    def lens(self, depth: int) -> tuple[Tensor, LensHead]:
        """Return the hidden states at ``depth``, from 1 on, and the head that reads them."""
        return self.hidden[depth - 1], _head_at(self.head, depth == self.depths)


@dataclass(frozen=True)
class Comparison:
    """The divergence between a student depth and a teacher depth, at each position.

    Attributes:
        student_depth: Block of the student, 1 for the first.
        teacher_depth: Block of the teacher.
        divergence: ``(N,)``, in nats.
        relative: Whether the two blocks are at equal relative depth.
        trained: Whether the two blocks are a lens pair of training.
    """

    student_depth: int
    teacher_depth: int
    divergence: Tensor
    relative: bool
    trained: bool

    @property
    def mean(self) -> float:
        """The mean of the divergence over all positions."""
        return self.divergence.mean().item()


@torch.no_grad()
def read(
    model: PreTrainedModel,
    ids: Sequence[int],
    lens_norm: bool,
    top_k: int,
    vocab_size: int | None = None,
) -> Reading:
    """Apply a model's lens to token ids at every depth.

    The logits of only two depths are in memory at a time.
    """
    check_count("top_k", top_k, 1)
    head = lens_head_from(model)
    vocab = head.weight.shape[0] if vocab_size is None else vocab_size
    if top_k > vocab:
        raise ValueError(
            f"top_k must not exceed the {vocab} entries of the vocabulary, got {top_k}"
        )
    tokens = torch.tensor(ids, device=head.weight.device)
    Limits.of([model], None).check("a text", {"input_ids": tokens})
    verify_lens(model)
    with evaluating(model), without_autocast(tokens.device):
        earlier = range(1, len(blocks_of(model)))
        states, final = hidden_states(model, earlier, {"input_ids": tokens[None]})
    hidden = [h[0] for h in [*states, final]]  # the final states already have the norm
    if not lens_norm:
        head = replace(head, norm=None)
    rows, last = [], _logp(final[0], head, True, vocab)
    for depth, h in enumerate(hidden, start=1):
        logp = _logp(h, head, depth == len(hidden), vocab)
        top = logp.topk(top_k)
        entropy = torch.special.entr(logp.exp()).sum(-1)
        final_kl = F.kl_div(logp, last, reduction="none", log_target=True).sum(-1)
        following = logp[:-1].gather(-1, tokens[1:, None])
        rank = (logp[:-1] > following).sum(-1) + 1
        right = (following[:, 0].exp(), rank)
        rows.append([x.cpu() for x in (top.indices, top.values.exp(), entropy, final_kl, *right)])
    return Reading(head, hidden, *map(torch.stack, zip(*rows, strict=True)))


@torch.no_grad()
def compare(
    student: Reading,
    teacher: Reading,
    pairs: Pairs | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    vocab_size: int | None = None,
) -> list[Comparison]:
    """Compare two models at equal relative depths, and at the lens pairs of training.

    Student depth ``i`` of ``Ls`` is compared with teacher depth ``max(1, round(i * Lt / Ls))``, so
    the last comparison is between the final outputs.
    """
    relative = {
        (i, max(1, round(i * teacher.depths / student.depths)))
        for i in range(1, student.depths + 1)
    }
    trained = _trained(pairs, student.depths, teacher.depths)
    result = []
    for i, j in sorted(relative | trained):
        (student_hidden, student_head), (teacher_hidden, teacher_head) = (
            student.lens(i),
            teacher.lens(j),
        )
        loss = symmetric_lens_loss(
            student_hidden,
            teacher_hidden,
            student_head,
            teacher_head,
            divergence=divergence,
            beta=beta,
            reduction="none",
            vocab_size=vocab_size,
        )
        result.append(Comparison(i, j, loss[0].cpu(), (i, j) in relative, (i, j) in trained))
    return result


def _head_at(head: LensHead, last: bool) -> LensHead:
    return replace(head, norm=None) if last else head


def _logp(hidden: Tensor, head: LensHead, last: bool, vocab: int) -> Tensor:
    x, head = hidden.float(), _head_at(head, last).prefix(vocab)
    if head.norm is not None:
        x = head.norm.forward(x)[0]
    return head.logits(x @ head.weight.float().T, 1.0)[0].log_softmax(-1)


def _trained(pairs: Pairs | None, student: int, teacher: int) -> set[tuple[int, int]]:
    if pairs is None:
        return set()
    if len(pairs) != 2 or len(pairs[0]) != len(pairs[1]):
        raise ValueError(
            "pairs must be (student_layers, teacher_layers), two lists of equal length:"
            f" got {pairs}"
        )
    sides = zip(("student", "teacher"), pairs, (student, teacher), strict=True)
    layers = [check_layers(f"pairs, {name} layers", list(x), total) for name, x, total in sides]
    return set(zip(*layers, strict=True))
