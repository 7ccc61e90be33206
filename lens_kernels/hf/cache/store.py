"""The cache of the teacher's hidden states. The teacher runs only once, to build the cache.

A cache is a folder of safetensors shards and ``manifest.json``, which holds the cache key and the
checksums of the shards. One process builds a cache while others wait. Several processes can
read it.
"""

from __future__ import annotations

import bisect
import logging
import operator
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from lens_kernels.hf.cache.key import (
    DTYPES,
    CacheKey,
    Example,
    Indexed,
    counted_positions,
    data_digest,
)
from lens_kernels.hf.cache.shards import (
    Manifest,
    is_free,
    plan_shards,
    read_tensors,
    save_shard,
)

__all__ = ["CacheKey", "TeacherCache", "counted_positions"]

# The name of a tensor in each shard: the number of rows of each example.
COUNTS = "counts"
# The maximum number of shards that are memory-mapped at the same time.
MAPPED_SHARDS = 64

_log = logging.getLogger(__name__)

RunTeacher = Callable[[list[Example]], Sequence[Mapping[str, Tensor]]]


class TeacherCache:
    """The teacher's hidden states of each example, at the positions that the loss counts.

    Create it with ``open``, ``build`` or ``open_or_build``, not by the constructor. A DataLoader
    can pickle it for its workers, each of which maps the shards that it reads.

    Args:
        folder: Folder of the cache.
        manifest: The content of ``manifest.json``.

    Raises:
        ValueError: A shard cannot be read.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.key, self.widths = folder, manifest.key, manifest.widths
        self._shards = manifest.shards
        self._firsts = [shard.first for shard in self._shards]
        self._mapped: dict[int, dict[str, Tensor]] = {}
        counts = torch.cat(
            [read_tensors(folder / shard.file, [COUNTS])[COUNTS] for shard in self._shards]
        )
        self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])

    @classmethod
    def open(cls, folder: str | Path, key: CacheKey) -> TeacherCache:
        """Open the complete cache of ``key`` in ``folder``, after checking all files' checksums.

        Raises:
            ValueError: The folder holds no cache, or its cache is incomplete, damaged or made for
                another key. The message says which.
        """
        folder = Path(folder)
        return cls(folder, Manifest.read_whole(folder, key))

    @classmethod
    def build(
        cls,
        folder: str | Path,
        key: CacheKey,
        examples: Indexed,
        run_teacher: RunTeacher,
        *,
        batch_size: int,
        shard_examples: int = 4096,
        shard_bytes: int = 256 << 20,
        progress: bool = True,
    ) -> TeacherCache:
        """Build a cache in a new or empty folder, or resume an unfinished build with this key.

        Args:
            folder: Folder of the cache.
            key: ``CacheKey.of`` the teacher and these ``examples``.
            examples: Mappings with ``input_ids`` and ``labels``, both ``(N,)``.
            run_teacher: Maps a list of examples to a list of mappings, one per example. Each maps
                every name of ``key.names`` to a tensor ``(counted positions, D)``. It is called
                without gradients.
            batch_size: Number of examples in a call of ``run_teacher``.
            shard_examples: Maximum number of examples in a shard that holds several batches.
            shard_bytes: Maximum size of a shard that holds several batches. A resumed build keeps
                the shards of its first run.
            progress: Show a progress bar.

        Raises:
            ValueError: An argument is out of range, the folder holds something else, or
                ``run_teacher`` returned wrong names, shapes or values.
            TypeError: ``run_teacher`` returned something other than matrices.
            RuntimeError: The disk does not have enough space.
        """
        folder = Path(folder)
        sizes = {"batch_size": batch_size, "shard_examples": shard_examples}
        for name, value in {**sizes, "shard_bytes": shard_bytes}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not len(examples):
            raise ValueError("examples is empty: pass at least one")
        if data_digest(examples) != key.data:
            raise ValueError("examples do not match key: make the key from them with CacheKey.of")
        counts = [
            len(counted_positions(x["labels"]))
            for x in map(examples.__getitem__, range(len(examples)))
        ]
        folder.mkdir(parents=True, exist_ok=True)
        ahead = {}
        if is_free(folder):
            ahead[0] = _call(
                run_teacher, [examples[i] for i in range(min(batch_size, len(examples)))], key
            )
            manifest = Manifest(key, {name: ahead[0][0][name].shape[1] for name in key.names}, [])
            limit = shard_bytes // manifest.row_bytes
            manifest.shards = plan_shards(counts, batch_size, shard_examples, limit)
        else:
            manifest = Manifest.read(folder, key)
            for shard in manifest.shards:
                if shard.checksum and shard.damage(folder):
                    shard.size = shard.checksum = None
        _check_space(folder, manifest)
        manifest.write(folder)
        with tqdm(total=len(examples), desc="teacher cache", disable=not progress) as bar:
            for shard in manifest.shards:
                if shard.checksum:
                    bar.update(shard.examples)
                    continue
                last = shard.first + shard.examples
                store = _Store(manifest, shard.rows)
                for start in range(shard.first, last, batch_size):
                    batch = range(start, min(start + batch_size, last))
                    results = ahead.pop(start, None) or _call(
                        run_teacher, [examples[i] for i in batch], key
                    )
                    for i, result in zip(batch, results, strict=True):
                        store.add(i, counts[i], result)
                    bar.update(len(batch))
                store.tensors[COUNTS] = torch.tensor(counts[shard.first : last])
                save_shard(store.tensors, folder, shard)
                manifest.write(folder)
        return cls(folder, manifest)

    @classmethod
    def open_or_build(
        cls,
        folder: str | Path,
        key: CacheKey,
        examples: Indexed,
        run_teacher: RunTeacher,
        **options: Any,
    ) -> TeacherCache:
        """Open the cache if it is complete, else call ``build``.

        If the folder holds anything else, raise an error and leave the folder unchanged. If another
        process is building the cache, log a warning and wait. The arguments ``folder``, ``key``,
        ``examples``, ``run_teacher`` and ``**options``, and the errors, are those of ``build``.
        """
        folder = Path(folder)
        if not is_free(folder) and Manifest.read(folder, key).complete:
            return cls.open(folder, key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            _log.warning("another process is building the teacher cache %s: waiting for it", folder)
            held = lock.acquire()
        with held:
            return cls.build(folder, key, examples, run_teacher, **options)

    def rows(self, example_ids: Iterable[int]) -> dict[str, Tensor]:
        """Return the hidden states of the examples ``example_ids``, concatenated, by name.

        The result has a tensor ``(counted positions, D)`` for each name in ``key.names``, on the
        CPU and in the dtype of the cache.
        """
        ids = [self._checked_id(i) for i in example_ids]
        spans = [(int(self._starts[i]), int(self._starts[i + 1])) for i in ids]
        total = sum(stop - start for start, stop in spans)
        dtype = DTYPES[self.key.dtype]
        out = {n: torch.empty(total, self.widths[n], dtype=dtype) for n in self.key.names}
        at = 0
        for i, (start, stop) in zip(ids, spans, strict=True):
            index = bisect.bisect_right(self._firsts, i) - 1
            shard = self._map(index)
            offset = int(self._starts[self._firsts[index]])
            for name, x in out.items():
                x[at : at + stop - start] = shard[name][start - offset : stop - offset]
            at += stop - start
        return out

    @property
    def nbytes(self) -> int:
        """The size of all shards in bytes."""
        return sum(shard.size or 0 for shard in self._shards)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def summary(self) -> str:
        """Return one line with the size, the dtype and the folder of the cache."""
        return (
            f"teacher cache: {len(self)} examples, {int(self._starts[-1])} rows,"
            f" {self.nbytes / 2**20:.1f} MiB, {self.key.dtype}, {self.folder}"
        )

    def __getstate__(self) -> dict[str, object]:
        # Pickling a mapped tensor would copy the shard's data.
        return {**self.__dict__, "_mapped": {}}

    def _checked_id(self, value: SupportsIndex) -> int:
        try:
            i = operator.index(value)
        except TypeError:
            raise TypeError(
                f"example_ids must be integers, got {type(value).__name__}:"
                " pass positions in the examples the cache was built from"
            ) from None
        if not 0 <= i < len(self):
            raise IndexError(
                f"example_ids must lie in [0, {len(self) - 1}], got {i}:"
                " pass positions in the examples the cache was built from"
            )
        return i

    def _map(self, index: int) -> dict[str, Tensor]:
        """Return a shard's tensors, memory-mapped.

        If ``MAPPED_SHARDS`` shards are mapped, unmap the shard whose last use is the longest ago.
        """
        if index in self._mapped:
            shard = self._mapped.pop(index)
        else:
            if len(self._mapped) >= MAPPED_SHARDS:
                del self._mapped[next(iter(self._mapped))]
            shard = read_tensors(self.folder / self._shards[index].file, self.key.names)
        self._mapped[index] = shard
        return shard


class _Store:
    """Collects the tensors of a shard, example by example."""

    def __init__(self, manifest: Manifest, rows: int) -> None:
        self.dtype_name = manifest.key.dtype
        self.tensors = {
            name: torch.empty(rows, width, dtype=DTYPES[self.dtype_name])
            for name, width in manifest.widths.items()
        }
        self.at = 0

    def add(self, example: int, count: int, result: Mapping[str, Tensor]) -> None:
        for name, out in self.tensors.items():
            x, expected = result[name], (count, out.shape[1])
            if x.shape != expected:
                raise ValueError(
                    f"run_teacher must return {name} of shape {expected} for example {example}, got"
                    f" {tuple(x.shape)}: keep only the rows at counted_positions(labels)"
                )
            rows = out[self.at : self.at + count]
            rows.copy_(x)
            if not rows.isfinite().all():
                raise ValueError(
                    f"run_teacher returned {name} for example {example} with values not finite in"
                    f" {self.dtype_name}: store bfloat16 or float32, or look for NaN in the teacher"
                )
        self.at += count


@torch.no_grad()
def _call(
    run_teacher: RunTeacher, batch: list[Example], key: CacheKey
) -> Sequence[Mapping[str, Tensor]]:
    results = run_teacher(batch)
    if len(results) != len(batch):
        raise ValueError(
            f"run_teacher must return one mapping for each of {len(batch)} examples, got"
            f" {len(results)}"
        )
    for result in results:
        if set(result) != set(key.names):
            raise ValueError(
                f"run_teacher must return the hidden states {key.names}, got {sorted(result)}:"
                " use the names in key.names"
            )
        for name, x in result.items():
            if not isinstance(x, Tensor) or x.dim() != 2:
                is_tensor = isinstance(x, Tensor)
                got = tuple(x.shape) if is_tensor else type(x).__name__
                raise (ValueError if is_tensor else TypeError)(
                    f"run_teacher must return {name} as a tensor of shape (counted positions, D),"
                    f" got {got}"
                )
    return results


def _check_space(folder: Path, manifest: Manifest) -> None:
    rows = sum(shard.rows for shard in manifest.shards if not shard.checksum)
    needed, free = rows * manifest.row_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise RuntimeError(
            f"folder {folder} does not have enough space: {rows} rows of {manifest.row_bytes} bytes"
            f" need {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; free some space,"
            " pass another folder, or store fewer layers or a smaller dtype"
        )
