"""Sparse targets on disk: a few tokens of the teacher's distribution at each position.

A cache of targets has the same kinds of files as a cache of hidden states. Training from a cache
never loads the teacher. Positions have different numbers of tokens, so a shard holds flat tensors:
``counts`` (positions of each example), ``sizes`` (tokens of each position), ``ids``, and ``draws``
(how often a token was sampled) or ``weights``, or both. The probability of a token is ``draws *
weight / samples``.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import SupportsIndex

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from lens_kernels.hf.cache.key import CacheKey, Example, Indexed, counted_positions, data_digest
from lens_kernels.hf.cache.shards import (
    Manifest,
    is_free,
    plan_shards,
    read_tensors,
    refusal,
    save_shard,
)
from lens_kernels.targets import RESTS, SparseTargets

# The expected data of a position, in units of four bytes. Only the number of examples in a shard
# depends on it.
POSITION_WIDTH = 16
SHARD_EXAMPLES, SHARD_BYTES = 4096, 256 << 20
# Fields of the key that are not compared, because training does not know how targets were made.
UNKNOWN = ("model", "precision", "kind")

# A function that makes targets from the positions of some examples in the data, and the examples.
# It returns ``sizes``, ``ids``, and ``draws`` or ``weights`` of each example.
MakeTargets = Callable[[range, list[Example]], Sequence[Mapping[str, Tensor]]]


def kind_of(
    name: str, number: int, temperature: float, proposal: float, source: str, rest: str | None
) -> str:
    """Return the text ``kind`` of a key. ``TargetCache`` reads ``number`` and ``rest`` from it.

    ``source`` is a word that identifies the draws, or the file of log-probabilities.
    """
    return f"{name} {number} {temperature:g} {proposal:g} {source} {rest or 'none'}"


class TargetCache:
    """The sparse targets of each example, at the positions that the loss counts."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.key, self._shards = folder, manifest.key, manifest.shards
        words = manifest.key.kind.split()
        rest = None if words[-1] == "none" else words[-1]
        if len(words) != 6 or rest not in RESTS:
            raise refusal(folder, f"the cache holds {manifest.key.kind!r}, no sparse targets")
        self.rest = rest
        self._samples = int(words[1]) if words[0] == "sampled" else 1
        self._firsts = [shard.first for shard in self._shards]
        self._read: tuple[int, dict[str, Tensor], Tensor, Tensor] | None = None

    @classmethod
    def read(cls, folder: str | Path, key: CacheKey) -> TargetCache:
        """Open a complete cache after checking every file. ``key`` may leave out the teacher.

        Raises:
            ValueError: The folder holds no cache, or its cache is incomplete, damaged, of another
                kind, or made from other data or with another tokenizer.
        """
        folder = Path(folder)
        return cls(folder, Manifest.read_whole(folder, key, UNKNOWN))

    @classmethod
    def build(
        cls,
        folder: str | Path,
        key: CacheKey,
        examples: Indexed,
        make: MakeTargets,
        *,
        batch_size: int,
        progress: bool = True,
    ) -> TargetCache:
        """Build a cache in a new or empty folder, or resume an unfinished build with this key.

        ``make`` makes the targets of ``batch_size`` examples at a time.

        Raises:
            ValueError: The folder holds something else, or the examples do not match the key.
        """
        folder = Path(folder)
        if not len(examples) or data_digest(examples) != key.data:
            raise ValueError("examples do not match key, or there are none: make the key from them")
        counts = [len(counted_positions(examples[i]["labels"])) for i in range(len(examples))]
        folder.mkdir(parents=True, exist_ok=True)
        if is_free(folder):
            manifest = Manifest(key, {"targets": POSITION_WIDTH}, [])
            limit = SHARD_BYTES // manifest.row_bytes
            manifest.shards = plan_shards(counts, batch_size, SHARD_EXAMPLES, limit)
        else:
            manifest = Manifest.read(folder, key)
        manifest.write(folder)
        with tqdm(total=len(examples), desc="targets", disable=not progress) as bar:
            for shard in manifest.shards:
                last = shard.first + shard.examples
                if shard.checksum and not shard.damage(folder):
                    bar.update(shard.examples)
                    continue
                made: list[Mapping[str, Tensor]] = []
                for start in range(shard.first, last, batch_size):
                    batch = range(start, min(start + batch_size, last))
                    made += make(batch, [examples[i] for i in batch])
                    bar.update(len(batch))
                found = [len(x["sizes"]) for x in made]
                if found != counts[shard.first : last]:
                    raise ValueError("targets must be made for all counted positions of an example")
                tensors = {name: torch.cat([x[name] for x in made]) for name in made[0]}
                save_shard({**tensors, "counts": torch.tensor(found)}, folder, shard)
                manifest.write(folder)
        return cls(folder, manifest)

    def targets(self, example_ids: Iterable[int]) -> SparseTargets:
        """Return the targets of the examples ``example_ids``, at all their positions in order."""
        parts = [self._example(self._checked_id(i)) for i in example_ids]
        sizes = torch.cat([size for size, _, _ in parts])
        listed = torch.arange(max(1, int(sizes.max()) if len(sizes) else 1)) < sizes[:, None]
        ids = torch.zeros(listed.shape, dtype=torch.int64)
        probabilities = torch.zeros(listed.shape)
        ids[listed] = torch.cat([x for _, x, _ in parts]).long()
        probabilities[listed] = torch.cat([x for *_, x in parts])
        return SparseTargets(ids, probabilities, self.rest)

    def __len__(self) -> int:
        return self._shards[-1].first + self._shards[-1].examples

    def summary(self) -> str:
        """Return one line with the size and folder of the cache."""
        rows = sum(shard.rows for shard in self._shards)
        size = sum(shard.size or 0 for shard in self._shards)
        return (
            f"teacher targets: {len(self)} examples, {rows} positions, {size / 2**20:.2f} MiB,"
            f" {size / max(1, rows):.0f} bytes a position, {self.folder}"
        )

    def _checked_id(self, value: SupportsIndex) -> int:
        i = operator.index(value)
        if not 0 <= i < len(self):
            raise IndexError(f"example_ids must lie in [0, {len(self) - 1}], got {i}")
        return i

    def _example(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        index = bisect.bisect_right(self._firsts, i) - 1
        if self._read is None or self._read[0] != index:
            path = self.folder / self._shards[index].file
            with safe_open(path, framework="pt") as file:
                names = [*file.keys()]
            shard = read_tensors(path, names)
            rows = torch.cat([torch.zeros(1, dtype=torch.int64), shard["counts"].cumsum(0)])
            entries = torch.cat([torch.zeros(1, dtype=torch.int64), shard["sizes"].cumsum(0)])
            self._read = index, shard, rows, entries
        _, shard, rows, entries = self._read
        first, last = rows[i - self._firsts[index]], rows[i - self._firsts[index] + 1]
        part = slice(int(entries[first]), int(entries[last]))
        p = torch.ones(part.stop - part.start)
        for name in ("draws", "weights"):
            if name in shard:
                p = p * shard[name][part].float()
        return shard["sizes"][first:last].long(), shard["ids"][part], p / self._samples

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_read": None}
