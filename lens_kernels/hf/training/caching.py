"""Numbers the examples of a trainer's datasets, and caches the teacher's hidden states for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lens_kernels.hf.cache.key import Example, Indexed
from lens_kernels.hf.cache.store import CacheKey, TeacherCache, counted_positions
from lens_kernels.hf.model.families import input_embeddings
from lens_kernels.hf.training.objective import LensObjective


class Numbered(Dataset):
    """A dataset that adds ``example_id``, the position of the example in the dataset."""

    def __init__(self, dataset: Indexed) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return {**self.dataset[index], "example_id": index}


def numbered(name: str, dataset: Indexed) -> Numbered:
    """Return ``dataset`` with numbered examples. Raise if it cannot be indexed."""
    if isinstance(dataset, dict) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"teacher_cache needs a {name} of known length that can be indexed,"
            f" got a {type(dataset).__name__}"
        )
    return Numbered(dataset)


def fill_caches(
    trainer: Any, objective: LensObjective, datasets: Mapping[str, Indexed | None]
) -> dict[str, TeacherCache]:
    """Cache the teacher's hidden states on every dataset, then release the teacher."""
    assert objective.teacher is not None
    device = input_embeddings(objective.teacher).device
    args, folder = trainer.args, Path(trainer.args.teacher_cache)

    def run_teacher(examples: list[Example]) -> list[dict[str, Tensor]]:
        inputs = {name: x.to(device) for name, x in trainer.data_collator(examples).items()}
        labels = inputs.pop("labels")
        inputs.pop("example_id", None)
        width = labels.shape[1]
        counts, flat = [], []
        for row, example in enumerate(examples):
            positions = counted_positions(example["labels"])
            counts.append(len(positions))
            flat.append(torch.as_tensor(positions) + row * width)
        with trainer.accelerator.autocast():
            rows = objective.teacher_rows(inputs, torch.cat(flat).to(device))
        names = [f"layer_{depth}" for depth in objective.teacher_layers] + ["final"]
        parts = [x.cpu().split(counts) for x in rows]
        return [dict(zip(names, x, strict=True)) for x in zip(*parts, strict=True)]

    caches = {}
    for name in ("train", "eval"):
        dataset = datasets[f"{name}_dataset"]
        if dataset is None:
            continue
        key = CacheKey.of(
            objective.teacher,
            dataset,
            tuple(objective.teacher_layers),
            trainer.processing_class,
            args.teacher_cache_dtype,
            trainer.accelerator.mixed_precision,
        )
        # Rank 0 builds the cache first. Then the first process of each other node opens the cache
        # if the nodes share a disk, or builds another cache. All other processes open a cache last.
        first, desc = args.main_process_first, f"caching the teacher's states, {name}"
        with first(local=False, desc=desc), first(desc=desc):
            caches[name] = TeacherCache.open_or_build(
                folder / name,
                key,
                dataset,
                run_teacher,
                batch_size=args.per_device_train_batch_size,
                progress=not args.disable_tqdm,
            )
    objective.release_teacher()
    return caches
