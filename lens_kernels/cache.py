"""The folder in which this package caches files for the user."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """Return ``lens_kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. The folder may be missing."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lens_kernels"
