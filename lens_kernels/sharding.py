"""A vocabulary that is sharded over a process group: each rank holds some rows of both heads."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lens_kernels import compat
from lens_kernels.lens import LensHead
from lens_kernels.options import check_int

# After a failed reduction, a rank waits up to 5 seconds for the other ranks to report a failure.
WAIT = 5.0


@dataclass(frozen=True)
class VocabularyShard:
    """The slice of the vocabulary that this rank holds.

    Attributes:
        group: Name of the process group.
        start: First entry of the slice.
        columns: Number of entries of the slice.
        widest: Number of entries of the largest slice of all ranks. It decides the size of chunks,
            because all ranks cut the tokens into the same chunks.
    """

    group: str
    start: int
    columns: int
    widest: int


class Reduction:
    """Reductions over the process group of a call.

    Reductions change their tensor in place.
    """

    def __init__(self, group: str) -> None:
        self.group = compat.process_group(group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def maximum(self, x: Tensor) -> Tensor:
        """Replace ``x`` by its elementwise maximum over all ranks."""
        with self.explained():
            dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Replace ``x`` by its elementwise sum over all ranks."""
        with self.explained():
            dist.all_reduce(x, dist.ReduceOp.SUM, self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return the tensors ``x`` of all ranks, stacked in rank order."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self.explained():
            dist.all_gather(parts, x, self.group)
        return torch.stack(parts)

    def begin_sum(self, x: Tensor) -> Any:
        """Start to replace ``x`` by its sum over all ranks. Call ``wait()`` of the result."""
        with self.explained():
            return dist.all_reduce(x, dist.ReduceOp.SUM, self.group, async_op=True)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Return a context in which the error of a reduction names the ranks that do not answer."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"a reduction over process_group failed on rank {self.rank} of {self.size}:"
                f" {str(error).strip()}. {_silent(self.group)}"
            ) from error


def _silent(group: Any) -> str:
    """Wait until other ranks report an error, and return a text that names all silent ranks."""
    ranks = dist.get_process_group_ranks(group)
    names = {rank: f"lens_kernels/failed/{group.group_name}/{rank}" for rank in ranks}
    try:
        store = compat.default_store()
        store.set(names[dist.get_rank()], "")
        end, late = time.monotonic() + WAIT, False
        while silent := [rank for rank in ranks if not store.check([names[rank]])]:
            if late:
                return f"Of all processes, rank {silent} reported no error: it ended, or is stuck"
            time.sleep(0.05)
            # The clock is read before the reports. A rank that reports in time is never named.
            late = time.monotonic() > end
    except RuntimeError:  # the rank that holds the store, usually rank 0, may have ended
        return "The store of the process group is gone: rank 0 probably ended"
    return "All ranks reported an error"


def local_head(name: str, head: LensHead, group: Any) -> LensHead:
    """Return this rank's part of a head.

    Only DTensors are split. Weight and bias must be ``Shard(0)`` on a mesh whose group is
    ``group``, and tensors of the norm must be replicated.
    """
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        kind = type(group).__name__
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {kind}")
    # imported here, because the import takes a second
    from torch.distributed.tensor import DTensor, Replicate, Shard

    parts = {id(x): part for part, x in head.tensors().items()}

    def local(x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return x
        part = parts[id(x)]
        expected = Shard(0) if part in ("weight", "bias") else Replicate()
        mesh = x.device_mesh
        if x.placements != (expected,) or mesh.get_group().group_name != group.group_name:
            raise ValueError(
                f"{name}.{part} is a DTensor with placements {x.placements} on {mesh}; it must have"
                f" ({expected},) on a mesh of one dimension whose group is process_group"
            )
        return x.to_local()

    return head.map(local)


def agreed(
    shape: torch.Size, mask: Tensor | None, reached: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, int]:
    """Return the numbers that must be equal on all ranks, because reductions depend on them.

    ``reached`` are the tensors that may need a gradient.
    """
    plain = {name: x for name, x in options.items() if not isinstance(x, Tensor)}
    grads = torch.is_grad_enabled(), [x.requires_grad for x in reached]
    return {
        "number of tokens": shape.numel(),
        "number of unmasked tokens": shape.numel() if mask is None else int(mask.sum()),
        "options (as a checksum)": zlib.crc32(repr(plain).encode()),
        "tensors that require a gradient (as a checksum)": zlib.crc32(repr(grads).encode()),
    }


def gather(
    group: Any, rows: Mapping[str, int], same: Mapping[str, int], device: torch.device
) -> dict[str, list[int]]:
    """Return the number of rows of each head on every rank.

    Raises:
        ValueError: The numbers ``same`` differ between ranks. Later reductions would not match, and
            might never end.
    """
    own = [*rows.values(), *same.values()]
    sent = torch.tensor(own, dtype=torch.int64, device=device)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group)
    table = torch.stack(received).t().tolist()
    for name, values in zip(same, table[len(rows) :], strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"all ranks of process_group must pass the same {name}, but rank by rank they are"
                f" {values}"
            )
    return dict(zip(rows, table, strict=False))


def shared_vocabulary(vocab_size: Any, sizes: Mapping[str, int]) -> int:
    """Return the vocabulary size of the softmaxes. ``sizes`` are the heads' vocabulary sizes."""
    smaller = min(sizes.values())
    shown = ", ".join(f"{name} has {size} entries" for name, size in sizes.items())
    if vocab_size is None:
        if smaller != max(sizes.values()):
            raise ValueError(
                f"the vocabularies differ: {shown}. If the first {smaller} tokens are the same in"
                f" both, pass vocab_size={smaller}; both softmaxes are then taken over that prefix"
            )
        return smaller
    if not 1 <= check_int("vocab_size", vocab_size) <= smaller:
        raise ValueError(f"vocab_size={vocab_size} must lie in [1, {smaller}]: {shown}")
    return vocab_size


def shard_of(group: Any, rows: Mapping[str, list[int]], vocab_size: int) -> VocabularyShard:
    """Return this rank's part of the first ``vocab_size`` entries.

    ``rows`` holds the number of rows of each head on every rank.

    Raises:
        ValueError: The slices of the heads differ within the shared vocabulary, or a rank holds no
            entry of it.
    """
    bounds: dict[str, list[tuple[int, int]]] = {}
    for name, sizes in rows.items():
        ends = torch.tensor(sizes).cumsum(0).clamp(max=vocab_size).tolist()
        bounds[name] = [*zip([0, *ends[:-1]], ends, strict=True)]
    slices, *others = bounds.values()
    if any(other != slices for other in others):
        shown = ", ".join(f"{name} {value}" for name, value in bounds.items())
        raise ValueError(
            f"both heads must be cut at the same entries of the shared vocabulary, got {shown}"
        )
    widths = [stop - start for start, stop in slices]
    if 0 in widths:
        raise ValueError(
            f"rank {widths.index(0)} of process_group holds none of the {vocab_size} entries of the"
            f" shared vocabulary: its slice is {slices[widths.index(0)]}; use fewer ranks"
        )
    rank = dist.get_rank(group)
    return VocabularyShard(group.group_name, slices[rank][0], widths[rank], max(widths))
