"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """Return ``lens_kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. It may not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lens_kernels"
