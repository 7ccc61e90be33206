"""Check every model type in a process of its own. Types that the table already has are skipped."""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.coverage.checks import send
from tests.coverage.page import PAGE, page

FIELDS = ("group", "type", "lens", "step", "copy", "padding", "checkpointing", "why")
# The fork server loads these modules once, so that the process of each type starts fast.
PRELOADED = [
    "tests.coverage.checks",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.mamba2.modeling_mamba2",
]
TABLE = Path(__file__).parent / "table.csv"


def types() -> list[tuple[str, str]]:
    """Return all model types of transformers, as pairs of group and name."""
    from transformers.models.auto import modeling_auto as auto

    causal = list(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    images = list(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return [("causal", x) for x in sorted(causal)] + [("image-text", x) for x in sorted(images)]


def run(kind: str, group: str, seconds: float, context: Any) -> dict[str, str]:
    """Check a type and return its table row, even if the process dies or runs out of time."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(kind, group, sender))
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


def read(path: Path) -> list[dict[str, str]]:
    """Read a table and return its rows."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Check the types that are not in the table, and write the table and docs/models.md."""
    parser = argparse.ArgumentParser(prog="tests.coverage", description=__doc__)
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV file; default %(default)s")
    parser.add_argument("--only", nargs="+", help="types to run again")
    parser.add_argument("--group", choices=("causal", "image-text"), help="run only this group")
    parser.add_argument("--seconds", type=float, default=300.0, help="time limit of a type")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = {(row["group"], row["type"]): row for row in read(args.table)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    for group, kind in types():
        if args.group not in (None, group):
            continue
        if kind in args.only if args.only else (group, kind) not in rows:
            rows[group, kind] = row = run(kind, group, args.seconds, context)
            sys.stdout.write(" ".join(row[name] for name in FIELDS) + "\n")
            sys.stdout.flush()
            write(args.table, [rows[key] for key in types() if key in rows])
    if args.table == TABLE:
        PAGE.write_text(page(read(TABLE), metadata.version("transformers")), encoding="utf-8")


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write the rows of a table to a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
