"""Models and tokenizers read from disk, or from the Hub where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(path: str, dtype: str = "auto", download: bool = False) -> Any:
    """Return a causal language model, with its adapter where ``path`` holds one.

    Weights are read from safetensors alone, and no code that comes with a model is run.

    Raises:
        ValueError: There is no such model, or not as safetensors.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kind: Any = AutoModelForCausalLM
    if (Path(path) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        kind = AutoPeftModelForCausalLM
    options = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "local_files_only": not download,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(_missing("model", path, error, download)) from error


def load_tokenizer(path: str, download: bool = False) -> Any:
    """Return the tokenizer of a model.

    Raises:
        ValueError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            path, local_files_only=not download, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(_missing("tokenizer", path, error, download)) from error


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Check that both tokenizers give every token the same number.

    Raises:
        ValueError: They do not; the message shows where.
    """
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    differing = [name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]]
    differing += mine.keys() ^ theirs.keys()
    if differing:
        shown = ", ".join(
            f"{name!r} (student {mine.get(name)}, teacher {theirs.get(name)})"
            for name in sorted(differing)[:3]
        )
        raise ValueError(
            f"student and teacher number {len(differing)} tokens differently: {shown}. Their"
            " distributions cannot be compared: choose models of one tokenizer"
        )


def _missing(what: str, path: str, error: Exception, download: bool) -> str:
    hint = " or a name on the Hub" if download else ", or allow_download for a name on the Hub"
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return f"the {what} {path!r} cannot be read: {reason}. Give the path of a folder{hint}"
