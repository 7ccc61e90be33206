"""The text of the study: its source, training and held-out parts, and tokenizer."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.study.settings import TeacherSettings
from lens_kernels.hf.model.smollm2 import smollm2

VOCABULARY = 2048
ROW = 128  # the number of tokens in a row
HELD_OUT_ROWS = 128
# SmolLM2 uses fewer rows, because its log probabilities take 25 MB per row.
PRETRAINED_HELD_OUT_ROWS = 32
# Twice the rows of a run. The teacher's states on these rows are cached: 0.8 GB.
PRETRAINED_TRAIN_ROWS = 960
# The documentation of Django (BSD-3-Clause): 640 files with 6.1 million characters of English prose
# and some code. Only the source distribution contains it, a file of 10.8 MB that pip downloads.
DJANGO = "Django==5.2.8"
DJANGO_FILE = "django-5.2.8.tar.gz"
DJANGO_SHA256 = "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"
END = 0  # the token between documents


@dataclass(frozen=True)
class Text:
    """Rows of ``ROW`` tokens: for training, and from held-out documents."""

    train: Tensor
    held_out: Tensor


def load(settings: TeacherSettings, folder: Path) -> Text:
    """Return the rows of a teacher's text, from a file in ``folder`` if the file exists."""
    name = f"{settings.text}-smollm2" if settings.pretrained else settings.text
    path = folder / f"text-{name}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        documents = _django(folder) if settings.text == "django" else _topics()
        random.Random(0).shuffle(documents)
        if settings.pretrained:
            train, held_out = _split(*_pretrained(documents, folder), PRETRAINED_HELD_OUT_ROWS)
            train = train[:PRETRAINED_TRAIN_ROWS]
        else:
            train, held_out = _split(*_trained(documents), HELD_OUT_ROWS)
        parts = path.with_suffix(".part")
        save_file({"train": train, "held_out": held_out}, parts)
        parts.replace(path)
    return Text(**{name: x.long() for name, x in load_file(path).items()})


def _django(folder: Path) -> list[str]:
    path = folder / DJANGO_FILE
    if not path.exists():
        # --no-build-isolation makes pip read the metadata with the installed setuptools, and
        # download nothing else.
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
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _trained(documents: list[str]) -> tuple[list[list[int]], int]:
    """Train a tokenizer on the documents. Return their tokens, and the token between documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return [tokenizer.encode(text).ids for text in documents], END


def _pretrained(documents: list[str], folder: Path) -> tuple[list[list[int]], int]:
    """Return the documents' tokens for SmolLM2, and the token between documents."""
    _, tokenizer = smollm2(folder)
    return [tokenizer(text).input_ids for text in documents], tokenizer.eos_token_id


def _split(documents: list[list[int]], end: int, held_out: int) -> tuple[Tensor, Tensor]:
    encoded = [[*ids, end] for ids in documents]
    # Hold out whole documents, until there are enough held-out rows.
    count, total = 0, 0
    while total < held_out * ROW:
        total += len(encoded[count])
        count += 1
    return _packed(encoded[count:]), _packed(encoded[:count])[:held_out]


def _packed(documents: Iterable[list[int]]) -> Tensor:
    ids = torch.tensor([i for document in documents for i in document], dtype=torch.int32)
    return ids[: len(ids) // ROW * ROW].view(-1, ROW)
