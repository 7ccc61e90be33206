"""Checks every model type in a process of its own, and skips types that the table has already."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.support.tables import read_csv, write_csv
from tests.coverage.checks import CHECKS, send
from tests.coverage.page import PAGE, made_with, page

FIELDS = ("group", "type", "lens", "step", "copy", "padding", "checkpointing", "why")
# The modules that the fork server loads once, so that the process of each type starts fast.
PRELOADED = [
    "tests.coverage.checks",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.mamba2.modeling_mamba2",
]
TABLE = Path(__file__).parent / "table.csv"
# The table of model types that have a lens in older versions.
VERSIONS = Path(__file__).parent / "versions.csv"


def types() -> list[tuple[str, str]]:
    """Return all model types of transformers, as pairs of group and name."""
    from transformers.models.auto import modeling_auto as auto

    causal = list(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    images = list(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return [("causal", x) for x in sorted(causal)] + [("image-text", x) for x in sorted(images)]


def run(
    kind: str, group: str, seconds: float, context: Any, checks: tuple[str, ...] = CHECKS
) -> dict[str, str]:
    """Check a type, and return its table row even if the process dies or runs out of time."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(kind, group, checks, sender))
    process.start()
    sender.close()
    row = {**dict.fromkeys(FIELDS, ""), "group": group, "type": kind, "lens": "not run"}
    try:
        row = receiver.recv() if receiver.poll(seconds) else {**row, "why": f"over {seconds:g} s"}
    except EOFError:
        row["why"] = "the process died"
    if process.is_alive():
        process.kill()
    process.join()
    return row


def versions() -> list[str]:
    return [name for name in (read_csv(VERSIONS) or [{}])[0] if name not in ("group", "type")]


def main() -> None:
    """Check the types that are not in the table, and write the table and docs/models.md."""
    parser = argparse.ArgumentParser(prog="tests.coverage", description=__doc__)
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV file; default %(default)s")
    parser.add_argument("--only", nargs="+", help="types to run again")
    parser.add_argument("--group", choices=("causal", "image-text"), help="run only this group")
    parser.add_argument("--seconds", type=float, default=300.0, help="time limit of a type")
    parser.add_argument(
        "--lens_only",
        action="store_true",
        help="check only lenses, and write them to versions.csv for this version of transformers",
    )
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    version = metadata.version("transformers")
    path, fields, checks = args.table, FIELDS, CHECKS
    if args.lens_only:
        path, checks = VERSIONS, ("lens",)
        fields = tuple(dict.fromkeys(("group", "type", *versions(), version)))
    rows = {(row["group"], row["type"]): row for row in read_csv(path)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    for key in types():
        group, kind = key
        known = bool(rows.get(key, {}).get(version if args.lens_only else "lens"))
        if args.group not in (None, group) or not (kind in args.only if args.only else not known):
            continue
        row = run(kind, group, args.seconds, context, checks)
        sys.stdout.write(" ".join(row[name] for name in FIELDS) + "\n")
        sys.stdout.flush()
        if args.lens_only:
            row = {**rows.get(key, {"group": group, "type": kind}), version: row["lens"]}
        rows[key] = row
        write_csv(path, [dict.fromkeys(fields, "") | rows[key] for key in sorted(rows)])
    if TABLE in (path, args.table):
        newest = version if path == TABLE else made_with()
        PAGE.write_text(page(read_csv(TABLE), newest, read_csv(VERSIONS)), encoding="utf-8")


if __name__ == "__main__":
    main()
