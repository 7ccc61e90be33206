"""The version, in a file that the build can read without importing torch."""

from __future__ import annotations

from importlib import metadata

__version__ = "0.1.0"


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
