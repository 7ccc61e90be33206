"""Reads records from JSON lines, JSON arrays, Parquet, saved datasets and the Hub."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, cast

from lens_kernels.hf.cache.key import chunks_of

HUB = "hub:"  # the prefix of datasets on the Hub: hub:NAME or hub:NAME:SPLIT

# A record's number in its file, and the record. A line that is not JSON gives its error instead.
Read = tuple[int, Any]


def read_records(source: str | Path, streaming: bool = False) -> Iterator[tuple[str, int, Any]]:
    """Yield ``(file, number, record)`` for every record of a source.

    With ``streaming``, a dataset on the Hub is downloaded while it is read. The formats are:

    - ``.json``: an array of objects, where ``number`` is the position, from 1; or JSON lines.
    - ``.parquet``, and a folder saved by ``datasets``: needs the package ``datasets``.
    - ``hub:NAME`` and ``hub:NAME:SPLIT``: a dataset on the Hugging Face Hub; by default its split
      ``train``. This needs ``datasets`` and a download.
    - Any other name: JSON lines, where ``number`` is the line. For a line that is not valid JSON,
      a ``ValueError`` is yielded as the record.

    JSON files ending in ``.gz`` are decompressed. A pattern such as ``data/*.jsonl`` means all
    files that match, sorted by name. If a file has exactly this name, only that file is read.

    Raises:
        ValueError: No file matches, a file is damaged, or a package is missing.
        OSError: A file cannot be read.
    """
    if is_on_hub(source):
        name, _, split = str(source).removeprefix(HUB).partition(":")
        load = _package("datasets", source).load_dataset
        dataset = load(name, split=split or "train", streaming=streaming)
        yield from ((str(source), i, record) for i, record in enumerate(dataset, 1))
        return
    for path in matching(source):
        yield from ((str(path), i, record) for i, record in _of_file(path))


def is_on_hub(source: str | Path) -> bool:
    """Return whether a source is a dataset on the Hugging Face Hub."""
    return str(source).startswith(HUB)


def check_download(source: str | Path, allow_download: bool) -> None:
    """Raise if a source is on the Hub, but downloads are not allowed."""
    if is_on_hub(source) and not allow_download:
        raise ValueError(
            f"{source} is on the Hugging Face Hub: allow downloads with --allow_download, or give a"
            " file"
        )


def source_digest(source: str | Path, streaming: bool = False) -> str:
    """Return a SHA-256 of all files of a source or, on the Hub, of the dataset's records.

    With ``streaming``, a dataset on the Hub is not read, and its name is returned.
    """
    if is_on_hub(source) and streaming:
        return str(source)
    if is_on_hub(source):
        records = [record for _, _, record in read_records(source)]
        return hashlib.sha256(json.dumps(records, default=str).encode()).hexdigest()
    found = matching(source)
    files = [x for path in found for x in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    each = [sha256_of(x) for x in files if not x.is_dir()]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` shows it."""
    found = hashlib.sha256()
    for chunk in chunks_of(path):
        found.update(chunk)
    return found.hexdigest()


def matching(source: str | Path) -> list[Path]:
    """Return the files and folders that match a pattern, or the file with this exact name."""
    if Path(source).exists() or not has_magic(str(source)):
        return [Path(source)]
    found = sorted(glob(str(source), recursive=True))
    if not found:
        raise ValueError(f"no file matches the pattern {source}")
    return [Path(name) for name in found]


def _of_file(path: Path) -> Iterator[Read]:
    if path.is_dir():
        return _saved(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    return _json(path)


def _saved(path: Path) -> Iterator[Read]:
    library = _package("datasets", path)
    try:
        dataset = library.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a dataset saved by datasets: {error}") from error
    if isinstance(dataset, dict):
        raise ValueError(
            f"{path} holds the splits {', '.join(dataset)}: give the folder of one of them"
        )
    return enumerate(dataset, 1)


def _parquet(path: Path) -> Iterator[Read]:
    library = _package("pyarrow.parquet", path)
    path.stat()  # raises a clear FileNotFoundError if the file is missing
    try:
        number = 0
        for batch in library.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def _package(name: str, source: str | Path) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{source} is read by the package datasets, which is missing: pip install datasets"
        ) from error


def _json(path: Path) -> Iterator[Read]:
    compressed = path.suffix == ".gz"
    with gzip.open(path) if compressed else path.open("rb") as opened:
        file = cast(BinaryIO, opened)
        try:
            if path.name.removesuffix(".gz").endswith(".json") and _begins_an_array(file):
                yield from _array(path, file)
            else:
                yield from _lines(file)
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{path} is not a complete gzip file: {error}") from error


def _begins_an_array(file: BinaryIO) -> bool:
    start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _array(path: Path, file: BinaryIO) -> Iterator[Read]:
    try:
        records = _decoded(file.read().removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return enumerate(records, 1)


def _lines(file: BinaryIO) -> Iterator[Read]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            try:
                yield number, _decoded(line)
            except ValueError as error:
                yield number, error


def _decoded(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno} ({error.msg})"
        if error.lineno > 1:
            place = f"line {error.lineno}, {place}"
        raise ValueError(f"not JSON at {place}: expected one object per line") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice: keep one of them")
    return record
