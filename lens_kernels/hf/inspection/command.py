"""The ``lens-kernels inspect`` command: pictures of models through the logit lens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lens_kernels.hf.inspection import figures
from lens_kernels.hf.inspection.inspect import inspect_lens
from lens_kernels.hf.inspection.reading import Pairs
from lens_kernels.hf.model.loading import check_tokenizers, load_model, load_tokenizer
from lens_kernels.hf.model.placement import moved
from lens_kernels.hf.training.data import check_count, load_examples
from lens_kernels.hf.training.files import check_download

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def inspect_models(
    student: Sequence[str],
    output: Path,
    *,
    text: Sequence[str] | None = None,
    data: str | None = None,
    teacher: str | None = None,
    layers: Sequence[str] | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    lens_norm: bool = True,
    top_k: int = 5,
    max_tokens: int = 64,
    max_texts: int = 32,
    prompt_style: str = "alpaca",
    vocab_size: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    allow_download: bool = False,
    say: Callable[[str], None],
) -> None:
    """Show what the logit lens predicts at every depth of one model or several.

    Args:
        student: Folder or Hub name of a model, or of several models with one tokenizer.
        output: Folder to write to; it is created if missing.
        text: Texts that the models read.
        data: Instead of text: a .txt file with a text in each line, or data as for training.
        teacher: Folder or Hub name of a model with which the others are compared.
        layers: Pairs of student and teacher layers that were used in training, such as 5:8 10:16.
        divergence: Name of the divergence: jsd, jeffreys, forward_kl, reverse_kl, tvd or hellinger.
        beta: Weight of the teacher in jsd, in (0, 1).
        lens_norm: Apply the final norm at intermediate depths too; the last always has it.
        top_k: Number of most likely tokens listed for each depth and position.
        max_tokens: Maximum number of tokens read of each text; the rest is cut off.
        max_texts: Maximum number of texts read from data.
        prompt_style: The format of prompts in data: alpaca or chat.
        vocab_size: Size of the shared vocabulary, if the models' vocabulary sizes differ.
        dtype: Dtype of the weights: float32, bfloat16, float16, or auto for the checkpoint's dtype.
        device: Device to run on. If not given, a GPU if there is one, else the CPU.
        allow_download: Allow downloads from the Hugging Face Hub.
        say: Called with a summary.

    Raises:
        ValueError: An argument, the data or a model is invalid.
        RuntimeError: matplotlib or the device is missing.
    """
    figures.check_matplotlib()  # fails before the slow work if matplotlib is missing
    pairs = layer_pairs(layers)
    if (text is None) == (data is None):
        raise ValueError("give either text or data")
    check_count("max_texts", max_texts, 1)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(1, device=device)  # fails if the device does not exist
    names = [*student, *([] if teacher is None else [teacher])]
    tokenizers = [load_tokenizer(name, allow_download) for name in names]
    texts: Sequence[str | Sequence[int]] = text or ()
    if data is not None:
        check_download(data, allow_download)
        texts = texts_of(data, tokenizers[0], prompt_style)[:max_texts]
    ids = {i for x in texts for i in (tokenizers[0](x)["input_ids"] if isinstance(x, str) else x)}
    for other in tokenizers[1:]:
        check_tokenizers(tokenizers[0], other, vocab_size, ids)
    models = [moved(load_model(name, dtype, allow_download), device) for name in names]
    result = inspect_lens(
        models[: len(student)],
        tokenizers[0],
        texts,
        teacher=None if teacher is None else models[-1],
        pairs=pairs,
        divergence=divergence,
        beta=beta,
        lens_norm=lens_norm,
        top_k=top_k,
        max_tokens=max_tokens,
        vocab_size=vocab_size,
    )
    result.write(output)
    say(f"pictures, numbers and page: {output / 'inspect.html'}")


def texts_of(
    data: str, tokenizer: PreTrainedTokenizerBase, prompt_style: str
) -> list[str] | list[list[int]]:
    """Return the lines of a ``.txt`` file, or the token ids of the examples of other data."""
    if data.endswith(".txt"):
        try:  # utf-8-sig leaves out a byte order mark, which would be the first text's first token
            lines = Path(data).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{data} is not UTF-8 at byte {error.start + 1}: save the file as UTF-8"
            ) from error
        return [line for line in lines if line.strip()]
    found = load_examples(data, tokenizer, prompt_style=prompt_style, progress=False)
    return [example["input_ids"] for example in found.examples]


def layer_pairs(texts: Sequence[str] | None) -> Pairs | None:
    """Parse texts like ``5:8`` into a list of student layers and a list of teacher layers."""
    if texts is None:
        return None
    bad = [text for text in texts if not re.fullmatch(r"\d+:\d+", text)]
    if bad:
        raise ValueError(f"layers must be pairs of two layers such as 5:8, got {bad[0]!r}")
    student, teacher = zip(*(map(int, text.split(":")) for text in texts), strict=True)
    return student, teacher
