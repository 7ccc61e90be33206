"""A student and its teacher, read through the logit lens of every depth on one text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_kernels.functional import symmetric_lens_loss
from lens_kernels.hf.families import (
    blocks_of,
    causal_lm_of,
    lens_head_from,
    verify_lens,
    verify_lens_head,
)
from lens_kernels.hf.layers import check_layers
from lens_kernels.lens import LensHead
from lens_kernels.validation import shared_vocabulary

Pairs = tuple[Sequence[int], Sequence[int]]
MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}


@dataclass(frozen=True)
class Reading:
    """What the lens of every depth predicts after each token of a text.

    Row ``i - 1`` of a tensor is depth ``i``, the output of block ``i``; the last is the model's own
    output. ``top_ids`` and ``top_probs`` are ``(L, N, k)``, ``entropy``, in nats, is ``(L, N)``,
    and ``next_prob``, the probability of the text's next token, ``(L, N - 1)``.
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
        """Return the hidden states at a depth and the head that reads them."""
        return self.hidden[depth - 1], _head_at(self.head, depth == self.depths)


@dataclass(frozen=True)
class Comparison:
    """Divergence of a student depth from a teacher depth, in nats, for each position.

    ``relative`` says that the teacher's depth is the one as far up as the student's, ``trained``
    that the two are a lens pair of training; a comparison can be both.
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
    """A text and all that was read from it; ``total_tokens`` counts those that were cut off too."""

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
        """Both readings with their roles."""
        return ("student", self.student), ("teacher", self.teacher)

    @property
    def max_entropy(self) -> float:
        """The largest entropy of both models: the end of their common colour scale."""
        return max(reading.entropy.max().item() for _, reading in self.sides)

    def top(self, reading: Reading, depth: int, position: int) -> tuple[str, bool]:
        """Return the likeliest next token, and whether the text goes on with it."""
        token = int(reading.top_ids[depth - 1, position, 0])
        return self.top_tokens[token], [token] == self.ids[position + 1 : position + 2]


def inspect(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    text: str,
    output: Path,
    *,
    pairs: Pairs | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    lens_norm: bool = True,
    top_k: int = 5,
    max_tokens: int = 64,
    vocab_size: int | None = None,
) -> Inspection:
    """Read ``text`` through every lens of both models; write pictures, numbers and a page.

    Into ``output`` go ``divergence_by_depth.png``, ``lens_student.png``, ``lens_teacher.png``,
    ``data.json`` with every number, and ``inspect.html``, which needs no other file.

    Args:
        student: A causal language model of Hugging Face.
        teacher: Another, with the same tokenizer.
        tokenizer: The tokenizer of both.
        text: What both models read.
        output: The folder to write to, made if it is missing.
        pairs: Student and teacher layers of training, to be compared beside equal relative depths.
        divergence: What compares them: jsd, jeffreys, forward_kl, reverse_kl, tvd or hellinger.
        beta: Weight of the teacher in jsd, in (0, 1).
        lens_norm: Whether intermediate depths pass the final norm. The last always does.
        top_k: How many tokens to list for each depth and position.
        max_tokens: Tokens of the text that are read; the rest is cut off, and the result says so.
        vocab_size: Size of the vocabulary that both models share, where theirs differ.

    Raises:
        TypeError: ``text``, ``top_k`` or ``max_tokens`` is of another kind.
        ValueError: An empty text, vocabularies of different size without ``vocab_size``, a
            tokenizer that does not fit the models, or layers that do not exist.
        RuntimeError: matplotlib is not installed.
    """
    # Without the library that draws, better to stop before the models run.
    from lens_kernels.hf.inspection import figures, page

    figures.check_matplotlib()
    size = shared_vocabulary(vocab_size, lens_head_from(student), lens_head_from(teacher))
    ids, total = encode(tokenizer, text, max_tokens, size)
    read_student = read(student, ids, lens_norm, top_k, size)
    read_teacher = read(teacher, ids, lens_norm, top_k, size)
    comparisons = compare(read_student, read_teacher, pairs, divergence, beta, size)
    shown = torch.cat([read_student.top_ids.flatten(), read_teacher.top_ids.flatten()]).unique()
    result = Inspection(
        text,
        ids,
        [token_text(tokenizer, i) for i in ids],
        total,
        divergence,
        read_student,
        read_teacher,
        comparisons,
        {i: token_text(tokenizer, i) for i in shown.tolist()},
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "data.json").write_text(json.dumps(numbers(result)), encoding="utf-8")
    figures.draw(result, output)
    page.write(result, output)
    return result


def encode(tokenizer: Any, text: str, max_tokens: int, vocab_size: int) -> tuple[list[int], int]:
    """Return the first ``max_tokens`` token ids of a text, and how many it has in all."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    _check_count("max_tokens", max_tokens)
    ids = tokenizer(text)["input_ids"] if text else []
    if not ids:
        raise ValueError(f"text must hold at least one token, got {text!r}: pass a sentence")
    if max(ids) >= vocab_size:
        raise ValueError(
            f"tokenizer gives token {max(ids)}, but the models share {vocab_size} entries:"
            " pass the tokenizer that both were trained with"
        )
    return ids[:max_tokens], len(ids)


@torch.no_grad()
def read(
    model: Any, ids: Sequence[int], lens_norm: bool, top_k: int, vocab_size: int | None = None
) -> Reading:
    """Read every depth of a model on token ids, holding the logits of one depth at a time."""
    _check_count("top_k", top_k)
    head = lens_head_from(model)
    vocab = head.weight.shape[0] if vocab_size is None else vocab_size
    if top_k > vocab:
        raise ValueError(f"top_k must not exceed the {vocab} entries of the vocabulary: {top_k}")
    tokens = torch.tensor(ids, device=head.weight.device)
    verify_lens(model)
    # Parts may be frozen in another mode than the whole.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        out = model(input_ids=tokens[None], output_hidden_states=True, use_cache=False)
    finally:
        for module in training:
            module.training = True
    hidden = [h[0] for h in out.hidden_states[1:]]  # the first are the embeddings
    assert len(hidden) == len(blocks_of(model))
    # Families hand out the last block's state normed; one that did not would be read wrongly.
    verify_lens_head(model, _head_at(head, last=True), hidden[-1], out.logits[0])
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
    """Compare each student depth with the teacher's at equal relative depth, and training's pairs.

    Student depth ``i`` of ``Ls`` meets teacher depth ``round(i * Lt / Ls)``, at least 1, so that
    the last comparison is that of the final outputs.
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


def numbers(result: Inspection) -> dict[str, Any]:
    """Return all numbers of an inspection as plain values."""

    def side(reading: Reading) -> dict[str, Any]:
        keys = ("top_ids", "top_probs", "entropy", "next_prob")
        values = {key: getattr(reading, key).tolist() for key in keys}
        tops = [[[result.top_tokens[i] for i in k] for k in row] for row in values["top_ids"]]
        return {"name": reading.name, "depths": reading.depths, "top_tokens": tops} | values

    return {
        "text": result.text,
        "ids": result.ids,
        "tokens": result.tokens,
        "total_tokens": result.total_tokens,
        "divergence": result.divergence,
        "student": side(result.student),
        "teacher": side(result.teacher),
        "comparisons": [
            {
                "student_depth": c.student_depth,
                "teacher_depth": c.teacher_depth,
                "relative": c.relative,
                "trained": c.trained,
                "mean": c.mean,
                "divergence": c.divergence.tolist(),
            }
            for c in result.comparisons
        ],
    }


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token's text with spaces and control characters made visible."""
    text = tokenizer.decode([token])
    # Sentencepiece drops a leading space when it decodes a single token.
    if str(tokenizer.convert_ids_to_tokens(token)).startswith("▁") and not text.startswith(" "):
        text = f" {text}"
    return "".join(map(_visible, text)) or "∅"


def _visible(char: str) -> str:
    if char in MARKS:
        return MARKS[char]
    return char if char.isprintable() else f"\\u{ord(char):04x}"


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


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _name(model: Any) -> str:
    """Return what to call a model: its repository or folder if it was loaded, else its class."""
    inner = causal_lm_of(model)
    origin = inner.config.name_or_path
    if not origin:
        return type(inner).__name__
    return Path(origin).name if Path(origin).is_dir() else origin
