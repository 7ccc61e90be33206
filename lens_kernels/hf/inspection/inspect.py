"""Inspect models through the logit lens, with pictures, a page and a file of numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lens_kernels import pictures
from lens_kernels.hf.inspection import figures
from lens_kernels.hf.inspection.page import page
from lens_kernels.hf.inspection.reading import Comparison, Pairs, compare, read
from lens_kernels.hf.inspection.results import QUANTITIES, TEACHER, Inspection, Passage
from lens_kernels.hf.model.anatomy import lens_head_from
from lens_kernels.hf.model.families import causal_lm_of
from lens_kernels.hf.training.data import check_count
from lens_kernels.sharding import shared_vocabulary
from lens_kernels.visible import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}


@dataclass(frozen=True)
class LensInspection(Inspection):
    """An inspection with its pictures and its HTML page, which a notebook shows.

    Attributes:
        divergence: Name of the divergence of the comparisons.
        names: Name of each model, by label.
        passages: The texts with their readings.
        top_tokens: The text of each token id that a reading holds.
    """

    def figures(self) -> dict[str, Figure]:
        """Return the pictures as matplotlib figures, by name."""
        return figures.draw(self)

    def page(self, drawn: Mapping[str, Figure] | None = None) -> str:
        """Return the HTML page with the figures ``drawn``, or by default those of ``figures()``."""
        return page(self, {name: _svg(x) for name, x in (drawn or self.figures()).items()})

    @pictures.styled
    def write(self, output: Path) -> None:
        """Write ``inspect.html``, ``data.json`` and the pictures to the folder ``output``."""
        output.mkdir(parents=True, exist_ok=True)
        (output / "data.json").write_text(json.dumps(numbers(self)), encoding="utf-8")
        drawn = self.figures()
        for name, figure in drawn.items():
            pictures.save(figure, output / f"{name}.png")
        (output / "inspect.html").write_text(self.page(drawn), encoding="utf-8")

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.page())}" width="100%" height="700"></iframe>'


def inspect_lens(
    student: PreTrainedModel | Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str | Sequence[int]],
    *,
    teacher: PreTrainedModel | None = None,
    pairs: Pairs | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    lens_norm: bool = True,
    top_k: int = 5,
    max_tokens: int = 64,
    vocab_size: int | None = None,
) -> LensInspection:
    """Apply the logit lens to texts, at every depth of one or more models.

    A notebook shows the result as a page, and its method ``write`` writes the page to a folder.
    Only the logits of one text at two depths are in memory at a time.

    Args:
        student: A Hugging Face causal language model, or a list of models.
        tokenizer: The tokenizer of all models.
        texts: A text, or several texts or lists of token ids.
        teacher: A model with which the others are compared.
        pairs: Layers of student and teacher that are lens pairs in training. They are compared too.
        divergence: Name of the divergence: jsd, jeffreys, forward_kl, reverse_kl, tvd or hellinger.
        beta: Weight of the teacher in jsd, in (0, 1).
        lens_norm: Apply the final norm at intermediate depths too; the last always has it.
        top_k: Number of most likely tokens listed for each depth and position.
        max_tokens: Maximum number of tokens read of each text; the rest is cut off.
        vocab_size: Size of the shared vocabulary, if the models' vocabulary sizes differ.

    Raises:
        TypeError: A text, ``top_k`` or ``max_tokens`` has the wrong type.
        ValueError: A text is empty, the vocabulary sizes differ without ``vocab_size``, the
            tokenizer does not fit the models, or a layer does not exist.
    """
    models = labelled(student, teacher)
    if pairs is not None and teacher is None:
        raise ValueError("pairs are layers of student and teacher: give a teacher")
    sizes = {
        f"{label.replace(' ', '_')}_head": len(lens_head_from(model).weight)
        for label, model in models.items()
    }
    size = shared_vocabulary(vocab_size, sizes)
    passages = []
    for text in [texts] if isinstance(texts, str) else texts:
        ids, total = encode(tokenizer, text, max_tokens, size)
        readings = {label: read(m, ids, lens_norm, top_k, size) for label, m in models.items()}
        comparisons = {
            label: compare(readings[label], readings[TEACHER], pairs, divergence, beta, size)
            for label in models
            if teacher is not None and label != TEACHER
        }
        # Drop the hidden states of each text after its readings, to save memory.
        kept = {label: replace(reading, hidden=[]) for label, reading in readings.items()}
        tokens = [token_text(tokenizer, i) for i in ids]
        shown = text if isinstance(text, str) else str(tokenizer.decode(ids))
        passages.append(Passage(shown, ids, tokens, total, kept, comparisons))
    if not passages:
        raise ValueError("texts must hold at least one text")
    tops = [x.top_ids.flatten() for passage in passages for x in passage.readings.values()]
    names = {label: model_name(model) for label, model in models.items()}
    top_tokens = {i: token_text(tokenizer, i) for i in torch.cat(tops).unique().tolist()}
    return LensInspection(divergence, names, passages, top_tokens)


def labelled(
    student: PreTrainedModel | Sequence[PreTrainedModel], teacher: PreTrainedModel | None
) -> dict[str, PreTrainedModel]:
    """Return the models by the labels that pictures and files use for them."""
    students = student if isinstance(student, (list, tuple)) else [student]
    if not students:
        raise ValueError("student must hold at least one model")
    models = {f"student {i}": model for i, model in enumerate(students, start=1)}
    if len(students) == 1:
        models = {"model" if teacher is None else "student": students[0]}
    return models if teacher is None else {**models, TEACHER: teacher}


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[int], max_tokens: int, vocab_size: int
) -> tuple[list[int], int]:
    """Return a text's first ``max_tokens`` token ids, and the number of all its token ids."""
    check_count("max_tokens", max_tokens, 1)
    if isinstance(text, str):
        ids = tokenizer(text)["input_ids"] if text else []
    elif isinstance(text, (list, tuple)):
        ids = list(text)
    else:
        raise TypeError(f"text must be a string or token ids, got {type(text).__name__}")
    if not ids:
        raise ValueError(f"text must hold at least one token, got {text!r}: pass a sentence")
    if max(ids) >= vocab_size:
        raise ValueError(
            f"tokenizer gives token {max(ids)}, but the models share {vocab_size} entries:"
            " pass the tokenizer that they were trained with"
        )
    return ids[:max_tokens], len(ids)


def numbers(result: Inspection) -> dict[str, object]:
    """Return all numbers of an inspection as plain Python values, for JSON."""
    summary = {
        label: {
            x: result.quartiles(label, x).tolist()
            for x in QUANTITIES
            if result.values(label, x).shape[1]
        }
        for label in result.names
    }
    shared = {"divergence": result.divergence, "names": result.names, "quartiles": summary}
    return {**shared, "texts": [_numbers(result, passage) for passage in result.passages]}


def _numbers(result: Inspection, passage: Passage) -> dict[str, object]:
    models = {}
    for label, reading in passage.readings.items():
        keys = ("top_ids", "top_probs", *QUANTITIES)
        values = {key: getattr(reading, key).tolist() for key in keys}
        tops = [[[result.top_tokens[i] for i in k] for k in row] for row in values["top_ids"]]
        models[label] = {"depths": reading.depths, "top_tokens": tops} | values
    compared = {
        label: [_plain(c) for c in comparisons]
        for label, comparisons in passage.comparisons.items()
    }
    keys = ("text", "ids", "tokens", "total_tokens")
    given = {key: getattr(passage, key) for key in keys}
    return {**given, "models": models, "comparisons": compared}


def _plain(comparison: Comparison) -> dict[str, object]:
    values = {x.name: getattr(comparison, x.name) for x in fields(comparison)}
    return values | {"divergence": comparison.divergence.tolist(), "mean": comparison.mean}


@pictures.styled
def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def model_name(model: PreTrainedModel) -> str:
    """Return the repository or folder that a model was loaded from, or the name of its class."""
    inner = causal_lm_of(model)
    origin = inner.config.name_or_path
    if not origin:
        return type(inner).__name__
    return Path(origin).name if Path(origin).is_dir() else origin


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token. Spaces and control characters are made visible."""
    text = str(tokenizer.decode([token]))
    # SentencePiece drops a leading space when it decodes a single token.
    if str(tokenizer.convert_ids_to_tokens(token)).startswith("▁") and not text.startswith(" "):
        text = f" {text}"
    return "".join(MARKS.get(char) or visible(char) for char in text) or "∅"
