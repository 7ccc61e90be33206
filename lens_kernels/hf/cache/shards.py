"""The files of a teacher cache: shards, and a manifest with their checksums.

Checksums detect damage, but not an attack: an attacker who can write to the folder can also write
checksums. So shard names are computed and not read from the manifest, and writing a file never
follows a link.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lens_kernels.hf.cache.key import DTYPES, CacheKey, digest, file_digest, json_bytes

MANIFEST = "manifest.json"
DIFFERS = {
    "format": "written in another format: found {found}, expected {expected}",
    "model": "made by another model: its config, weights, buffers or adapters differ",
    "data": "made from other data: its tokens or labels differ",
    "layers": "made for other layers: found {found}, expected {expected}",
    "tokenizer": "made with another tokenizer",
    "dtype": "stored in another dtype: found {found}, expected {expected}",
    "kind": "of another kind: found {found}, expected {expected}",
    "precision": "computed in another mixed precision: found {found}, expected {expected}",
}


@dataclass
class Shard:
    """A range of examples, and the file with their data.

    ``size`` and ``checksum`` are None until the file is written.
    """

    file: str
    first: int
    examples: int
    rows: int
    size: int | None = None
    checksum: str | None = None

    def damage(self, folder: Path) -> str | None:
        """Return a text that describes how the shard's file is damaged, or None if it is sound."""
        path = folder / self.file
        if not path.is_file():
            return f"{self.file} is missing"
        if (size := path.stat().st_size) != self.size:
            return f"{self.file} is damaged: {size} bytes long, not {self.size}"
        if file_digest(path) != self.checksum:
            return f"{self.file} is damaged: its checksum differs"
        return None


@dataclass
class Manifest:
    """The key of a cache, and a list of all its shards, including those not written yet."""

    key: CacheKey
    widths: dict[str, int]
    shards: list[Shard]

    @property
    def complete(self) -> bool:
        """Whether all shards are written."""
        return all(shard.checksum for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        """The bytes of all hidden states that are stored for one position."""
        return sum(self.widths.values()) * DTYPES[self.key.dtype].itemsize

    def write(self, folder: Path) -> None:
        """Write a temporary file and rename it, so that an interrupt leaves the old manifest."""
        fields = {**asdict(self), "complete": self.complete}
        fields["checksum"] = digest([json_bytes(fields)])
        partial = _new_file(folder / f"{MANIFEST}.partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(fields, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / MANIFEST)

    @classmethod
    def read_whole(cls, folder: Path, key: CacheKey, unknown: Iterable[str] = ()) -> Manifest:
        """Return the manifest like ``read``, after checking that all shards exist and are sound."""
        manifest = cls.read(folder, key, unknown)
        if not manifest.complete:
            done, total = sum(bool(x.checksum) for x in manifest.shards), len(manifest.shards)
            raise refusal(
                folder,
                f"the cache has only {done} of {total} shards (open_or_build, or the command that"
                " began the cache, would finish it)",
            )
        for shard in manifest.shards:
            if damage := shard.damage(folder):
                raise refusal(folder, damage)
        return manifest

    @classmethod
    def read(cls, folder: Path, key: CacheKey, unknown: Iterable[str] = ()) -> Manifest:
        """Return the manifest of ``folder``. Raise an error if it is damaged or has another key.

        Fields of the key that are named in ``unknown`` are not compared. The returned manifest has
        their values from the file.
        """
        if not (folder / MANIFEST).is_file():
            raise ValueError(
                f"folder {folder} holds no teacher cache: it has no {MANIFEST};"
                " pass the cache's folder, or build one in a new or empty folder"
            )
        try:
            fields = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            sound = fields.pop("checksum") == digest([json_bytes(fields)])
            found, widths = fields["key"], fields["widths"]
            shards = [Shard(**shard) for shard in fields["shards"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise refusal(folder, f"{MANIFEST} cannot be read ({error!r})") from error
        if not sound:
            raise refusal(folder, f"{MANIFEST} is damaged: its checksum differs")
        expected = {**asdict(key), "layers": list(key.layers)}
        # Another format may have other fields, so the format is compared first.
        found = found if isinstance(found, dict) else {}
        names = ["format"] if found.get("format") != key.format else [*DIFFERS]
        unknown = {*unknown} & found.keys()
        key = replace(key, **{name: found[name] for name in unknown})
        names = [name for name in names if name not in unknown]
        reasons = [
            DIFFERS[name].format(found=found.get(name), expected=expected[name])
            for name in names
            if found.get(name) != expected[name]
        ]
        if reasons:
            raise refusal(folder, "; ".join(reasons))
        whole = (
            isinstance(key.kind, str)
            and isinstance(widths, dict)
            and list(widths) == key.names
            and bool(shards)
        )
        whole = whole and all(type(x) is int and x > 0 for x in widths.values())
        first = 0
        for index, shard in enumerate(shards):
            counts = (shard.first, shard.examples, shard.rows)
            whole = whole and all(type(x) is int and x >= 0 for x in counts)
            whole = whole and (shard.file, shard.first) == (shard_name(index), first)
            first += shard.examples if whole else 0
        if not whole:
            raise refusal(folder, f"{MANIFEST} does not describe the files of a teacher cache")
        return cls(key, widths, shards)


def shard_name(index: int) -> str:
    """Return the file name of the shard ``index``."""
    return f"shard-{index:05d}.safetensors"


def _new_file(path: Path) -> Path:
    """Create an empty file.

    An existing file or link is removed first, because writing would follow the link.
    """
    path.unlink(missing_ok=True)
    path.open("x").close()
    return path


def plan_shards(
    counts: list[int], batch_size: int, max_examples: int, max_rows: int
) -> list[Shard]:
    """Divide the examples into shards. All examples of a batch are in the same shard."""
    shards: list[Shard] = []
    for first in range(0, len(counts), batch_size):
        batch = counts[first : first + batch_size]
        examples, rows = len(batch), sum(batch)
        last = shards[-1] if shards else None
        if (
            last is not None
            and last.examples + examples <= max_examples
            and last.rows + rows <= max_rows
        ):
            last.examples += examples
            last.rows += rows
        else:
            shards.append(Shard(shard_name(len(shards)), first, examples, rows))
    return shards


def save_shard(tensors: dict[str, Tensor], folder: Path, shard: Shard) -> None:
    """Write a shard to a temporary file and rename it. Record its size and checksum."""
    partial = _new_file(folder / f"{shard.file}.partial")
    save_file(tensors, partial)
    # save_file makes files that only their owner can read, but several users may share a cache.
    shutil.copymode(folder / MANIFEST, partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    shard.size, shard.checksum = partial.stat().st_size, file_digest(partial)
    partial.replace(folder / shard.file)


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return a file's tensors, memory-mapped: their data is read from disk at its first use."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def is_free(folder: Path) -> bool:
    """Return whether a new cache can be built in the folder."""
    # If the first write was interrupted, the folder holds only the manifest's temporary file.
    return not folder.exists() or all(p.name == f"{MANIFEST}.partial" for p in folder.iterdir())


def refusal(folder: Path, reason: str) -> ValueError:
    """Return the error for a folder whose cache cannot be used because of ``reason``."""
    return ValueError(
        f"folder {folder} is refused: {reason}; delete the folder to build the cache again, or"
        " pass another folder"
    )
