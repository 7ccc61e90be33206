"""Models and tokenizers read from disk, or from the Hub if downloads are allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(path: str, dtype: str = "auto", download: bool = False) -> Any:
    """Return a causal language model, with its adapter if ``path`` holds one.

    Only safetensors files are read, and code in the model's repository is not run.

    Raises:
        ValueError: The model or dtype does not exist, or the model is not in safetensors.
        RuntimeError: ``path`` holds an adapter, and peft is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    options: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "local_files_only": not download,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    try:
        adapter = find_adapter_config_file(path, local_files_only=not download)
        if adapter is None:
            return AutoModelForCausalLM.from_pretrained(path, **options)
        if not _has(path, "adapter_model.safetensors", download):  # peft would load a pickle
            raise ValueError(
                "the adapter has no adapter_model.safetensors; save it again with save_pretrained"
            )
        from peft import AutoPeftModelForCausalLM

        # With a relative path, peft looks for a tokenizer of that name on the Hub.
        folder = str(Path(adapter).parent.absolute())
        # peft freezes adapters by default, but a student is trained. Base models load in eval mode.
        return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, **options).eval()
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the model {path!r} needs the package {error.name}: pip install 'lens-kernels[train]'"
        ) from error
    except Exception as error:  # each file format raises its own errors for broken files
        raise ValueError(_unreadable("model", path, error, download)) from error


def load_tokenizer(path: str, download: bool = False) -> Any:
    """Return the tokenizer of a model, or of its base model if an adapter has none.

    Raises:
        ValueError: No tokenizer can be read.
    """
    try:
        source = path
        adapter = find_adapter_config_file(path, local_files_only=not download)
        if adapter is not None and not _has(path, "tokenizer_config.json", download):
            source = json.loads(Path(adapter).read_text("utf-8"))["base_model_name_or_path"]
        return AutoTokenizer.from_pretrained(
            source, local_files_only=not download, trust_remote_code=False
        )
    except Exception as error:
        raise ValueError(_unreadable("tokenizer", path, error, download)) from error


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Check that both tokenizers give every token the same id.

    Raises:
        ValueError: They do not; the message lists tokens that differ.
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
            f"student and teacher have different ids for {len(differing)} tokens: {shown}. Their"
            " distributions cannot be compared: choose models with the same tokenizer"
        )


def _has(path: str, name: str, download: bool) -> bool:
    try:
        cached_file(path, name, local_files_only=not download)
    except OSError:
        return False
    return True


def _unreadable(what: str, path: str, error: Exception, download: bool) -> str:
    hint = " or a name on the Hub" if download else ", or allow_download for a name on the Hub"
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return (
        f"the {what} {path!r} cannot be read: {reason}. Give the folder of a model in safetensors"
        f" with its tokenizer{hint}"
    )
