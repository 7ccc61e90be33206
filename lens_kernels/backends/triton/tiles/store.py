"""Saves the tiles that tuning found as a JSON file in the user's cache folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from lens_kernels import cache
from lens_kernels.backends.triton.interpreter import INTERPRETING
from lens_kernels.backends.triton.kernels.launch import Tile
from lens_kernels.backends.triton.tiles.sizes import Arch, Sweep, arch_of, invalid_reason

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The fields that identify a tile in the file.
NAME = ("device", "triton", "sweep", "dtype", "width")

# The key of a tile: the sweep, the operands' dtype, and the smaller hidden size.
Key = tuple[Sweep, torch.dtype, int]


def lookup(sweep: Sweep, dtype: torch.dtype, width: int, device: torch.device) -> Tile | None:
    """Return the tile that tuning found on this GPU model, or None."""
    return None if INTERPRETING else tiles(device).get((sweep, dtype, width))


def is_tuned(dtype: torch.dtype | None, device: torch.device) -> bool:
    """Return whether tuning has finished on this GPU model for ``dtype`` (None: for any dtype).

    Tuning saves the tile of sweep 3 last, so this tile is only there after tuning has finished.
    """
    if INTERPRETING:
        return False
    tuned = {of for sweep, of, _ in tiles(device) if sweep is Sweep.GRADIENTS}
    return bool(tuned) if dtype is None else dtype in tuned


@functools.cache
def tiles(device: torch.device) -> dict[Key, Tile]:
    """Return all tiles that tuning found on this GPU model. Each process reads the file once."""
    return load(device_name(device), arch_of(device))


def device_name(device: torch.device) -> str:
    """Return the model name of a GPU."""
    return torch.cuda.get_device_name(device)


def path() -> Path:
    """Return the path of the file with the tiles."""
    return cache.folder() / "tiles.json"


def load(device: str, arch: Arch) -> dict[Key, Tile]:
    """Return a GPU model's valid tiles for this version of Triton. Warn about all other tiles."""
    found: dict[Key, Tile] = {}
    problems: list[str] = []
    versions: set[str] = set()
    try:
        records = _read()
    except (OSError, ValueError) as error:
        records = []
        problems.append(f"the file cannot be read ({error})")
    for record in records:
        try:
            if record["device"] != device:
                continue
            if record["triton"] == triton.__version__:
                key, tile = _parse(record, arch)
                found[key] = tile
            else:
                versions.add(str(record["triton"]))
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"an entry is invalid ({type(error).__name__}: {error})")
    if versions and not found and not problems:
        written = ", ".join(sorted(versions))
        problems.append(
            f"they were tuned with triton {written}, but {triton.__version__} is installed"
        )
    if problems:
        more = f", and {len(problems) - 1} more" if problems[1:] else ""
        warnings.warn(
            f"{path()} holds tuned tiles that are not used: {problems[0]}{more}. Delete it, or run"
            " `lens-kernels tune` again",
            stacklevel=2,
        )
    return found


def save(device: str, key: Key, tile: Tile) -> None:
    """Save a tile. It replaces a tile with the same GPU model, version of Triton and key.

    The file is replaced as a whole. A lock prevents processes from writing at the same time.
    """
    new = record_of(device, key, tile)
    with _locked():
        try:
            old = [record for record in _read() if isinstance(record, dict)]
        except ValueError as error:
            warnings.warn(f"{path()} could not be read and is replaced: {error}", stacklevel=2)
            old = []
        kept = [record for record in old if any(record.get(k) != new[k] for k in NAME)]
        text = json.dumps({"format": FORMAT, "tiles": [*kept, new]}, indent=1)
        temporary = path().with_suffix(".new")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, path())
        finally:
            temporary.unlink(missing_ok=True)
    tiles.cache_clear()


def check_writable() -> None:
    """Raise the OSError that ``save`` would raise later, before the slow search."""
    with _locked():
        temporary = path().with_suffix(".new")
        temporary.touch()
        temporary.unlink()


def record_of(device: str, key: Key, tile: Tile) -> dict[str, Any]:
    """Return a tile as an entry of the file."""
    sweep, dtype, width = key
    name = (device, triton.__version__, sweep.value, str(dtype).removeprefix("torch."), width)
    return {**dict(zip(NAME, name, strict=True)), "tile": asdict(tile)}


def _parse(record: dict[str, Any], arch: Arch) -> tuple[Key, Tile]:
    sweep, dtype = Sweep(record["sweep"]), DTYPES[record["dtype"]]
    width, tile = record["width"], Tile(**record["tile"])
    if any(type(value) is not int for value in (width, *asdict(tile).values())):
        raise TypeError("sizes must be integers")
    reason = invalid_reason(tile, sweep, arch, dtype.itemsize)
    if reason is not None:
        raise ValueError(reason)
    return (sweep, dtype, width), tile


def _read() -> list[Any]:
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"the file has no format number {FORMAT}")
    if not isinstance(content.get("tiles"), list):
        raise ValueError("the file has no list of tiles")
    return content["tiles"]


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    import fcntl  # imported here because Windows has no fcntl

    path().parent.mkdir(parents=True, exist_ok=True)
    with path().with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
