"""Finds the checkpoints from which a run can resume: all their files exist and can be read.

The Trainer writes the files of a checkpoint one after the other, and ``trainer_state.json`` last. A
killed run or a full disk can leave files missing or cut off. Checksums, which this package writes
after all other files, show damage within a file. They do not show tampering.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from safetensors import safe_open

from lens_kernels.hf.cache.key import chunks_of
from lens_kernels.hf.training.matrices import PROJECTIONS
from lens_kernels.hf.training.text_files import read_text, write_text

_log = logging.getLogger(__name__)

STATE = "trainer_state.json"
INDEX = "model.safetensors.index.json"
CHECKSUMS = "checksums.json"  # Checkpoints of other tools lack this file.
# Each JSON file must have this key, with a value of this type.
KEYS = {STATE: ("global_step", int), INDEX: ("weight_map", dict)}

# A checkpoint needs a file or folder for one pattern of WEIGHTS and for one of OPTIMIZER. FSDP and
# DeepSpeed write folders.
WEIGHTS = ("model.safetensors", INDEX, "adapter_model.safetensors", "pytorch_model*")
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
OPTIONAL = (CHECKSUMS, "config.json", "scaler.pt")  # files that are checked only if they exist


def last_whole(
    output: Path, processes: int, projections: bool
) -> tuple[Path | None, dict[Path, str]]:
    """Return the last complete checkpoint in ``output``, and why later checkpoints are skipped.

    Raises:
        ValueError: No checkpoint is whole, but at least one has ``trainer_state.json``, the file
            that is written last.
    """
    numbered = []
    for folder in output.glob("checkpoint-*"):
        if folder.is_dir() and (step := re.fullmatch(r"checkpoint-(\d+)", folder.name)):
            numbered.append((int(step[1]), folder))
    skipped: dict[Path, str] = {}
    for _, folder in sorted(numbered, reverse=True):
        reason = damage(folder, processes, projections)
        if reason is None:
            return folder, skipped
        skipped[folder] = reason
    if any((folder / STATE).exists() for folder in skipped):
        raise ValueError(
            f"no checkpoint in {output} can be resumed ({_listed(skipped)}): restore these files,"
            " or delete the checkpoints to start over"
        )
    return None, skipped


def check_whole(folder: Path, processes: int, projections: bool) -> None:
    """Raise if a file of the checkpoint ``folder`` is missing or cannot be read."""
    reason = damage(folder, processes, projections)
    if reason is not None:
        raise ValueError(f"cannot resume from {folder}: {reason}; give another checkpoint")


def folder_to_resume(
    given: str | bool | None, output: Path, processes: int, projections: bool
) -> str | None:
    """Return the folder of a run's ``resume_from_checkpoint``, after checking its files.

    True means the last whole checkpoint in ``output``.

    Raises:
        ValueError: A file is missing or damaged, or ``output`` has no whole checkpoint.
    """
    if not given:
        return None
    if given is not True:
        check_whole(Path(given), processes, projections)
        return str(given)
    found, skipped = last_whole(output, processes, projections)
    for folder, reason in skipped.items():
        _log.warning("%s is skipped: %s", folder, reason)
    if found is None:
        raise ValueError(f"{output} holds no checkpoint to resume from: train without it")
    return str(found)


def damage(folder: Path, processes: int, projections: bool) -> str | None:
    """Return the name and the fault of the first missing or unreadable file, or None.

    Args:
        folder: Folder of the checkpoint.
        processes: Number of processes of the run that resumes. Each process has a file of its
            random number generators' states.
        projections: Whether the run trains matrices for the MSE term, which have a file too.
    """
    files = []
    for file in _needed(folder, processes, projections):
        files.append(file)
        try:
            _read(file)
        except FileNotFoundError:
            return f"{file.name} is missing"
        except Exception as error:  # each library raises its own errors for broken files
            reason = str(error).strip().split("\n")[0]
            return f"{file.name} cannot be read ({reason or type(error).__name__})"
    return _changed(folder, files) or _of_other_ranks(folder, processes)


def _of_other_ranks(folder: Path, processes: int) -> str | None:
    """Return a text if DeepSpeed cannot divide the optimizer's state over this many processes.

    DeepSpeed's program ``ds_to_universal`` converts a checkpoint for any number of processes.
    """
    files = [x.name for x in folder.glob("global_step*/*zero_pp_rank_*_optim_states.pt")]
    ranks = {name.partition("zero_pp_rank_")[2].partition("_")[0] for name in files}
    if not ranks or len(ranks) == processes or (folder / "latest_universal").exists():
        return None
    return (
        f"DeepSpeed wrote it with {len(ranks)} processes, and can read it only with as many, but"
        f" this run has {processes}"
    )


def _changed(folder: Path, files: Iterable[Path]) -> str | None:
    """Return the name and the fault of the first file that differs from its checksum, or None."""
    if not (folder / CHECKSUMS).exists():
        return None
    written = json.loads(read_text(folder / CHECKSUMS))  # ``damage`` has already read this file
    sums = {folder / name: checksum for name, checksum in written.items()}
    for file in chain.from_iterable(sorted(x.rglob("*")) if x.is_dir() else [x] for x in files):
        if file in sums and sums[file] != _checksum(file):
            return f"{file.name} was changed: its checksum is not that in {CHECKSUMS}"
    return None


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in a checkpoint, after the last of them is written."""
    files = [x for x in sorted(folder.rglob("*")) if x.is_file() and x.name != CHECKSUMS]
    sums = {x.relative_to(folder).as_posix(): _checksum(x) for x in files}
    write_text(folder / CHECKSUMS, json.dumps(sums, indent=1))


def _checksum(file: Path) -> str:
    """Return the CRC-32 of a file. Training waits for it, and other digests are slower."""
    crc = 0
    for chunk in chunks_of(file):
        crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _needed(folder: Path, processes: int, projections: bool) -> Iterator[Path]:
    yield folder / STATE
    for names in (WEIGHTS, OPTIMIZER):
        found = [file for name in names for file in sorted(folder.glob(name))]
        if names is WEIGHTS:
            # each named adapter has a subfolder
            found += sorted(folder.glob("*/adapter_model.safetensors"))
        yield from found or [folder / names[0]]
    if (folder / INDEX).exists():  # the index was read before
        shards: Mapping[str, str] = json.loads(read_text(folder / INDEX))["weight_map"]
        yield from (folder / name for name in sorted(set(shards.values())))
    if (folder / "adapter_config.json").exists():
        yield from (folder / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    yield folder / "scheduler.pt"
    yield from _random_states(folder, processes)
    yield from (folder / name for name in OPTIONAL if (folder / name).exists())
    if projections:
        yield folder / f"{PROJECTIONS}.safetensors"


def _random_states(folder: Path, processes: int) -> Iterator[Path]:
    """Yield the files of random states that the processes of the interrupted run wrote.

    The resuming run may have another number of processes. The Trainer then starts with other random
    states, which change only dropout.
    """
    alone = folder / "rng_state.pth"
    written = len([*folder.glob("rng_state_*.pth")])
    if processes == 1 and written < 2 or alone.exists() and not written:
        yield alone
        return
    # If the interrupted run had several processes, each process must have a file.
    expected = written if written > 1 else processes
    yield from (folder / f"rng_state_{rank}.pth" for rank in range(expected))


def _read(file: Path) -> None:
    """Raise if a file is cut off. Only parts of large files are read."""
    if file.is_dir():
        if not any(file.iterdir()):
            raise ValueError("the folder is empty")
    elif file.suffix == ".json":
        content = json.loads(read_text(file))
        key, kind = KEYS.get(file.name, ("", object))
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise ValueError("it holds something else")
        if file.name == INDEX and not all(isinstance(x, str) for x in content[key].values()):
            raise ValueError("it holds something else")
    elif file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):  # safe_open compares the file's size with its header
            pass
    else:  # torch.save writes a ZIP archive, whose list of contents is at its end
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    archive.read(name)


def _listed(skipped: Mapping[Path, str]) -> str:
    return "; ".join(f"{folder.name}: {reason}" for folder, reason in skipped.items())
