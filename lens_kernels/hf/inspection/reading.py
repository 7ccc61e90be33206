"""Apply the logit lens to one text, at every depth of a student and its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_kernels.functional import symmetric_lens_loss
from lens_kernels.hf.model.anatomy import blocks_of, lens_head_from, verify_lens
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.families import causal_lm_of
from lens_kernels.hf.model.layers import check_layers
from lens_kernels.hf.model.state import evaluating, without_autocast
from lens_kernels.hf.training.data import check_count
from lens_kernels.lens import LensHead

Pairs = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Reading:
    """Next-token predictions of the lens at every depth, after each token of a text.

    Row ``i - 1`` of a tensor belongs to depth ``i``, the output of block ``i``. The last row is the
    model's own output.

    Attributes:
        name: The model's folder or name.
        hidden: The hidden states of each depth, ``(N, D)``.
        head: The head that reads them.
        top_ids: ``(L, N, k)``, the most likely next tokens.
        top_probs: ``(L, N, k)``, their probabilities.
        entropy: ``(L, N)``, in nats.
        next_prob: ``(L, N - 1)``, the probability of the text's next token.
    """

    name: str
    hidden: list[Tensor]
    head: LensHead
    top_ids: Tensor
    top_probs: Tensor
    entropy: Tensor
    next_prob: Tensor

    @property
    def depths(self) -> int:
        """The number of blocks."""
        return len(self.hidden)

    def lens(self, depth: int) -> tuple[Tensor, LensHead]:
        """Return the hidden states at ``depth`` (1 is the first) and the head that reads them."""
        return self.hidden[depth - 1], _head_at(self.head, depth == self.depths)


@dataclass(frozen=True)
class Comparison:
    """Divergence between a student depth and a teacher depth, for each position.

    Attributes:
        student_depth: Block of the student, 1 for the first.
        teacher_depth: Block of the teacher.
        divergence: ``(N,)``, in nats.
        relative: Whether both are at the same relative depth.
        trained: Whether they are a lens pair of training. A comparison can be both.
    """

    student_depth: int
    teacher_depth: int
    divergence: Tensor
    relative: bool
    trained: bool

    @property
    def mean(self) -> float:
        """The mean over positions."""
        return self.divergence.mean().item()


@dataclass(frozen=True)
class Inspection:
    """A text and its readings by both models.

    Attributes:
        text: The text.
        ids: Its token ids, up to the maximum number.
        tokens: Their texts, with spaces and control characters made visible.
        total_tokens: Number of the text's tokens, including those that are cut off.
        divergence: Name of the divergence of the comparisons.
        student: The student's reading.
        teacher: The teacher's reading.
        comparisons: The comparisons, ordered by depth.
        top_tokens: The text of each token id that a reading holds.
    """

    text: str
    ids: list[int]
    tokens: list[str]
    total_tokens: int
    divergence: str
    student: Reading
    teacher: Reading
    comparisons: list[Comparison]
    top_tokens: dict[int, str]

    @property
    def sides(self) -> tuple[tuple[str, Reading], ...]:
        """Both readings, each with its role: student or teacher."""
        return ("student", self.student), ("teacher", self.teacher)

    @property
    def max_entropy(self) -> float:
        """The largest entropy of both models: the end of the shared colour scale."""
        return max(reading.entropy.max().item() for _, reading in self.sides)

    def top(self, reading: Reading, depth: int, position: int) -> tuple[str, bool]:
        """Return the most likely next token of ``reading`` at ``depth`` after ``position``.

        Return also whether it is the text's next token.
        """
        token = int(reading.top_ids[depth - 1, position, 0])
        return self.top_tokens[token], [token] == self.ids[position + 1 : position + 2]


@torch.no_grad()
def read(
    model: Any, ids: Sequence[int], lens_norm: bool, top_k: int, vocab_size: int | None = None
) -> Reading:
    """Apply the lens to token ids at every depth, with the logits of one depth in memory."""
    check_count("top_k", top_k, 1)
    head = lens_head_from(model)
    vocab = head.weight.shape[0] if vocab_size is None else vocab_size
    if top_k > vocab:
        raise ValueError(
            f"top_k must not exceed the {vocab} entries of the vocabulary, got {top_k}"
        )
    tokens = torch.tensor(ids, device=head.weight.device)
    verify_lens(model)
    with evaluating(model), without_autocast(tokens.device):
        earlier = range(1, len(blocks_of(model)))
        states, final = hidden_states(model, earlier, {"input_ids": tokens[None]})
    hidden = [h[0] for h in [*states, final]]  # the final states are normed already
    if not lens_norm:
        head = replace(head, norm=None)
    rows = []
    for depth, h in enumerate(hidden, start=1):
        logits = _logits(h, _head_at(head, depth == len(hidden)).prefix(vocab))
        logp = logits.log_softmax(-1)
        top = logp.topk(top_k)
        entropy = torch.special.entr(logp.exp()).sum(-1)
        following = logp[:-1].gather(-1, tokens[1:, None])[:, 0].exp()
        rows.append([x.cpu() for x in (top.indices, top.values.exp(), entropy, following)])
    return Reading(_name(model), hidden, head, *map(torch.stack, zip(*rows, strict=True)))


@torch.no_grad()
def compare(
    student: Reading,
    teacher: Reading,
    pairs: Pairs | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    vocab_size: int | None = None,
) -> list[Comparison]:
    """Compare the depths at equal relative depth, and the lens pairs of training.

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


def _logits(hidden: Tensor, head: LensHead) -> Tensor:
    x = hidden.float()
    if head.norm is not None:
        x = head.norm.forward(x)[0]
    return head.logits(x @ head.weight.float().T, 1.0)[0]


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


def _name(model: Any) -> str:
    """Return a model's name: its repository or folder if it was loaded, else its class."""
    inner = causal_lm_of(model)
    origin = inner.config.name_or_path
    if not origin:
        return type(inner).__name__
    return Path(origin).name if Path(origin).is_dir() else origin
