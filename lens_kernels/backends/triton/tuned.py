"""Tiles that tuning found, kept in one JSON file in the user's cache folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton

from lens_kernels import cache
from lens_kernels.backends.triton.interpreter import INTERPRETING
from lens_kernels.backends.triton.tiles import Arch, Sweep, Tile, arch_of, objection

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Key = tuple[Sweep, torch.dtype, int]


@dataclass(frozen=True)
class Entry:
    """The tile for a sweep over operands of this dtype, the narrower of them ``width`` wide."""

    device: str
    triton: str
    sweep: Sweep
    dtype: torch.dtype
    width: int
    tile: Tile

    def record(self) -> dict[str, Any]:
        """Return the entry as it stands in the file, what names it first."""
        dtype = str(self.dtype).removeprefix("torch.")
        name = {"device": self.device, "triton": self.triton, "sweep": self.sweep.value}
        return {**name, "dtype": dtype, "width": self.width, "tile": asdict(self.tile)}


def lookup(sweep: Sweep, dtype: torch.dtype, width: int, device: torch.device) -> Tile | None:
    """Return the tile that tuning found on this device, or None."""
    return None if INTERPRETING else tiles(device).get((sweep, dtype, width))


def is_complete(dtype: torch.dtype | None, device: torch.device) -> bool:
    """Say whether tuning has come to its end here, for operands of a dtype or of any."""
    done = {of for sweep, of, _ in tiles(device) if sweep is Sweep.GRADIENTS}
    return bool(done) if dtype is None else dtype in done


@functools.cache
def tiles(device: torch.device) -> dict[Key, Tile]:
    """Return all tiles that tuning found on a device; the file is read once for each."""
    return load(default_path(), device_name(device), arch_of(device))


def device_name(device: torch.device) -> str:
    """Return the model of a GPU."""
    return torch.cuda.get_device_name(device)


def default_path() -> Path:
    """Return the file that ``lookup`` reads."""
    return cache.folder() / "tiles.json"


def load(path: Path, device: str, arch: Arch) -> dict[Key, Tile]:
    """Return the usable entries for a device; warn of others, once."""
    found: dict[Key, Tile] = {}
    problems: list[str] = []
    others: set[str] = set()
    try:
        for record in _records(path):
            try:
                if record["device"] != device:
                    continue
                if record["triton"] != triton.__version__:
                    others.add(str(record["triton"]))
                    continue
                key, tile = _parse(record, arch)
                found[key] = tile
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"an entry is invalid ({type(error).__name__}: {error})")
    except (OSError, ValueError) as error:
        problems.append(f"it cannot be read ({error})")
    if others and not found and not problems:
        versions = ", ".join(sorted(others))
        problems.append(f"it is for triton {versions}, and this is {triton.__version__}")
    if problems:
        more = f", and {len(problems) - 1} more" if problems[1:] else ""
        warnings.warn(
            f"{path} holds tuned tiles that are not used: {problems[0]}{more}. Delete it, or run"
            " `lens-kernels tune` again",
            stacklevel=2,
        )
    return found


def _records(path: Path) -> list[Any]:
    """Return what stands in the file; raise ValueError if that makes no sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a file of format {FORMAT}")
    if not isinstance(content.get("tiles"), list):
        raise ValueError("no list of tiles")
    return content["tiles"]


def _parse(record: dict[str, Any], arch: Arch) -> tuple[Key, Tile]:
    sweep, dtype = Sweep(record["sweep"]), DTYPES[record["dtype"]]
    width, tile = record["width"], Tile(**record["tile"])
    if any(type(value) is not int for value in (width, *asdict(tile).values())):
        raise TypeError("sizes must be integers")
    reason = objection(tile, sweep, arch, dtype.itemsize)
    if reason is not None:
        raise ValueError(reason)
    return (sweep, dtype, width), tile


def save(path: Path, entry: Entry) -> None:
    """Add an entry to the file, in place of one with the same name.

    Readers see the file before or after, never in between; writers wait for each other.
    """
    new = entry.record()
    with _locked(path):
        try:
            old = [record for record in _records(path) if isinstance(record, dict)]
        except ValueError as error:
            warnings.warn(f"{path} could not be read and is replaced: {error}", stacklevel=2)
            old = []
        name = [field.name for field in fields(Entry) if field.name != "tile"]
        kept = [record for record in old if any(record.get(k) != new[k] for k in name)]
        text = json.dumps({"format": FORMAT, "tiles": [*kept, new]}, indent=1)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    tiles.cache_clear()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # Triton runs on Linux; importing this module should not fail elsewhere

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_writable(path: Path) -> None:
    """Raise OSError now if ``save`` would later."""
    with _locked(path), tempfile.TemporaryFile(dir=path.parent):
        pass
