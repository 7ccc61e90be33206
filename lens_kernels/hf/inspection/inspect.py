"""Inspects two models, and writes pictures, a file of numbers and an HTML page to a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lens_kernels.hf.inspection import figures, page
from lens_kernels.hf.inspection.reading import (
    Inspection,
    Pairs,
    Reading,
    compare,
    read,
)
from lens_kernels.hf.model.anatomy import lens_head_from
from lens_kernels.hf.model.loading import check_tokenizers, load_model, load_tokenizer
from lens_kernels.hf.training.data import check_count
from lens_kernels.sharding import shared_vocabulary
from lens_kernels.visible import visible

MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}


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
    """Apply the lens at every depth of both models to ``text``, and write the results to files.

    The files are ``divergence_by_depth.png``, ``lens_student.png``, ``lens_teacher.png``,
    ``data.json`` with all numbers, and ``inspect.html``, which needs no other file.

    Args:
        student: A Hugging Face causal language model.
        teacher: Another causal language model, with the same tokenizer.
        tokenizer: The tokenizer of both.
        text: Text that both models read.
        output: Folder to write to; it is created if missing.
        pairs: Layers of student and teacher that are lens pairs in training. They are compared too.
        divergence: Name of the divergence: jsd, jeffreys, forward_kl, reverse_kl, tvd or hellinger.
        beta: Weight of the teacher in jsd, in (0, 1).
        lens_norm: Apply the final norm at intermediate depths too; the last always has it.
        top_k: Number of most likely tokens listed for each depth and position.
        max_tokens: Maximum number of tokens read; the rest of the text is cut off.
        vocab_size: Size of the shared vocabulary, if the models' vocabulary sizes differ.

    Raises:
        TypeError: ``text``, ``top_k`` or ``max_tokens`` has the wrong type.
        ValueError: The text is empty, the vocabulary sizes differ without ``vocab_size``, the
            tokenizer does not fit the models, or a layer does not exist.
        RuntimeError: matplotlib is not installed.
    """
    # If matplotlib is missing, this raises an error before the models run.
    figures.check_matplotlib()
    models = {"student_head": student, "teacher_head": teacher}
    sizes = {name: len(lens_head_from(model).weight) for name, model in models.items()}
    size = shared_vocabulary(vocab_size, sizes)
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


def inspect_models(
    student: str,
    teacher: str,
    text: str,
    output: Path,
    *,
    layers: Sequence[str] | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    lens_norm: bool = True,
    top_k: int = 5,
    max_tokens: int = 64,
    vocab_size: int | None = None,
    allow_download: bool = False,
    say: Callable[[str], None],
) -> None:
    """Show what the logit lens predicts at every depth of two models, on one text.

    Args:
        student: Folder or Hub name of the student.
        teacher: Folder or Hub name of the teacher; it must have the same tokenizer.
        text: Text that both models read.
        output: Folder to write to; it is created if missing.
        layers: Pairs of student and teacher layers that were used in training, such as 5:8 10:16.
        divergence: Name of the divergence: jsd, jeffreys, forward_kl, reverse_kl, tvd or hellinger.
        beta: Weight of the teacher in jsd, in (0, 1).
        lens_norm: Apply the final norm at intermediate depths too; the last always has it.
        top_k: Number of most likely tokens listed for each depth and position.
        max_tokens: Maximum number of tokens read; the rest of the text is cut off.
        vocab_size: Size of the shared vocabulary, if the models' vocabulary sizes differ.
        allow_download: Allow downloads from the Hugging Face Hub.
        say: Called with a summary.

    Raises:
        ValueError: An argument or a model is invalid.
        RuntimeError: matplotlib is not installed.
    """
    pairs = layer_pairs(layers)
    tokenizer, other = (load_tokenizer(name, allow_download) for name in (student, teacher))
    check_tokenizers(tokenizer, other, vocab_size, tokenizer(text)["input_ids"])
    models = [load_model(name, "float32", allow_download) for name in (student, teacher)]
    inspect(
        models[0],
        models[1],
        tokenizer,
        text,
        output,
        pairs=pairs,
        divergence=divergence,
        beta=beta,
        lens_norm=lens_norm,
        top_k=top_k,
        max_tokens=max_tokens,
        vocab_size=vocab_size,
    )
    say(f"pictures, numbers and page: {output / 'inspect.html'}")


def layer_pairs(texts: Sequence[str] | None) -> Pairs | None:
    """Parse ``5:8`` and so on into the student layers and the teacher layers."""
    if texts is None:
        return None
    bad = [text for text in texts if not re.fullmatch(r"\d+:\d+", text)]
    if bad:
        raise ValueError(f"layers must be pairs of two layers such as 5:8, got {bad[0]!r}")
    student, teacher = zip(*(map(int, text.split(":")) for text in texts), strict=True)
    return student, teacher


def encode(tokenizer: Any, text: str, max_tokens: int, vocab_size: int) -> tuple[list[int], int]:
    """Return the first ``max_tokens`` token ids of a text, and the number of ids before the cut."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    check_count("max_tokens", max_tokens, 1)
    ids = tokenizer(text)["input_ids"] if text else []
    if not ids:
        raise ValueError(f"text must hold at least one token, got {text!r}: pass a sentence")
    if max(ids) >= vocab_size:
        raise ValueError(
            f"tokenizer gives token {max(ids)}, but the models share {vocab_size} entries:"
            " pass the tokenizer that both were trained with"
        )
    return ids[:max_tokens], len(ids)


def numbers(result: Inspection) -> dict[str, Any]:
    """Return all numbers of an inspection as plain Python values, for JSON."""

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
    """Return the text of a token. Spaces and control characters are made visible."""
    text = tokenizer.decode([token])
    # SentencePiece drops a leading space when it decodes a single token.
    if str(tokenizer.convert_ids_to_tokens(token)).startswith("▁") and not text.startswith(" "):
        text = f" {text}"
    return "".join(MARKS.get(char) or visible(char) for char in text) or "∅"
