"""The text of the study: where it comes from, how it is split, and its tokenizer."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 2048
ROW = 128  # the number of tokens in a row
HELD_OUT_ROWS = 128
# The documentation of Django (BSD-3-Clause) has 640 files with 6.1 million characters of English
# prose and some code. Only the source distribution contains it. pip downloads that file of 10.8 MB.
DJANGO = "Django==5.2.8"
DJANGO_FILE = "django-5.2.8.tar.gz"
DJANGO_SHA256 = "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"
SOURCES = ("django", "topics")
END = 0  # the token between documents


@dataclass(frozen=True)
class Text:
    """The text as rows of ``ROW`` tokens, for training and from held-out documents."""

    train: Tensor
    held_out: Tensor


def load(source: str, folder: Path) -> Text:
    """Return the rows of a source, from a file in ``folder`` if it exists."""
    path = folder / f"text-{source}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        documents = _django(folder) if source == "django" else _topics()
        parts = path.with_suffix(".part")
        torch.save(_rows(documents), parts)
        parts.replace(path)
    return Text(*(x.long() for x in torch.load(path)))


def _django(folder: Path) -> list[str]:
    """Return the texts of Django's documentation."""
    path = folder / DJANGO_FILE
    if not path.exists():
        # To read the metadata, pip uses the setuptools that is installed, so it downloads nothing
        # else.
        flags = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-q", "-d"]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        subprocess.run([*pip, *flags, str(folder), DJANGO], check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != DJANGO_SHA256:
        raise RuntimeError(
            f"{path} has SHA-256 {found}, expected {DJANGO_SHA256}: delete the file and run again"
        )
    texts = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if re.fullmatch(r"[^/]+/docs/.*\.txt", member.name):
                file = archive.extractfile(member)
                assert file is not None
                texts[member.name] = file.read().decode()
    return [texts[name] for name in sorted(texts)]


def _topics() -> list[str]:
    """Return the topics of Python's ``help``: a small text that needs no download."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _rows(documents: list[str]) -> tuple[Tensor, Tensor]:
    """Train the tokenizer, and return the rows for training and the held-out rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    random.Random(0).shuffle(documents)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    encoded = [[*tokenizer.encode(text).ids, END] for text in documents]
    # Whole documents are held out, until they fill the held-out rows.
    count, total = 0, 0
    while total < HELD_OUT_ROWS * ROW:
        total += len(encoded[count])
        count += 1
    return _packed(encoded[count:]), _packed(encoded[:count])[:HELD_OUT_ROWS]


def _packed(documents: Iterable[list[int]]) -> Tensor:
    ids = torch.tensor([i for document in documents for i in document], dtype=torch.int32)
    return ids[: len(ids) // ROW * ROW].view(-1, ROW)
