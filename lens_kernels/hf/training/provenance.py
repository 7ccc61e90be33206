"""The origin of a student: package versions, the user's git commit, and digests of models."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from lens_kernels.hf.cache.key import file_digest
from lens_kernels.hf.cache.shards import MANIFEST
from lens_kernels.version import __version__, version_of

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "triton")
# The files of a saved model that decide its results: config, weights and tokenizer.
OF_MODEL = (
    *("*config.json", "*.safetensors", "tokenizer.json", "vocab.*", "merges.txt", "*.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*"),
)


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of the packages that it uses."""
    own = {"python": platform.python_version(), "lens_kernels": __version__}
    found = {package: version_of(package) for package in PACKAGES}
    return own | {package: version for package, version in found.items() if version is not None}


def commit() -> str | None:
    """Return the git commit of the current folder, or None outside of a repository.

    The suffix ``-dirty`` means that tracked files have changed since the commit.
    """
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def folder_digest(path: str | Path) -> str:
    """Return a SHA-256 of a file, of a published lens, or of the manifests of sparse targets.

    The manifests hold the checksums of all other files.
    """
    path = Path(path)
    if not path.is_dir():
        return file_digest(path)
    files = [*path.glob("*.pt"), *path.glob(f"*/{MANIFEST}")]
    each = [f"{file.relative_to(path)} {file_digest(file)}" for file in sorted(files)]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def model_digest(model: str) -> str | None:
    """Return a SHA-256 of a folder's ``OF_MODEL``, or the commit of a model on the Hub.

    Return None if a model on the Hub has not been downloaded yet.
    """
    folder = Path(model)
    if folder.is_dir():
        files = {file for pattern in OF_MODEL for file in folder.glob(pattern)}
        each = [f"{file.name} {file_digest(file)}" for file in sorted(files)]
        return hashlib.sha256("\n".join(each).encode()).hexdigest()
    try:
        config = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # loading the model raises a clearer error
        return None
    return f"commit {Path(config).parent.name}" if isinstance(config, str) else None
