"""Runs the GPU tests in order of importance, and writes a CSV row when a test ends.

Run it with ``python -m tests.support.gpu_report --out DIR``. Arguments for pytest follow ``--``, as
in ``-- -n 12 -k parity``. A row has the outcome, versions and device. Each process of pytest-xdist
loads this module as a plugin, and orders the tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.support import environment, tables
from tests.support import ROOT

FILE = "tests.csv"
# The outcomes of a test's phases, from best to worst. The outcome of a test is that of its worst
# phase.
ORDER = ("passed", "skipped", "failed")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Sort the tests by importance: first parity of the row kernel, last tests of ``triton``."""
    items.sort(key=rank)


def rank(item: Any) -> int:
    """Return the sort key of a test: lower numbers run first."""
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    if backend == "triton":
        return 3
    return 2 if backend is None else int("parity" not in item.name)


class Recorder:
    """A pytest plugin that writes the outcome of every test."""

    def __init__(self, path: Path, where: dict[str, str]) -> None:
        self.path, self.where = path, where
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        row = self.rows.setdefault(
            report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0, "note": ""}
        )
        row["seconds"] += report.duration
        if ORDER.index(report.outcome) > ORDER.index(row["outcome"]):
            row["outcome"], row["note"] = report.outcome, note(report)
        # The last phase of a test is "teardown", unless the test ended its process.
        if report.when not in ("setup", "call"):
            row["seconds"] = f"{row['seconds']:.2f}"
            tables.append_csv(self.path, row | self.where)


def note(report: Any) -> str:
    """Return, in one line, why a test was skipped or failed."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (str(crash.message if crash else report.longrepr).strip() or "?").splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=environment.OUT, metavar="DIR")
    parser.add_argument("--device", default="cuda", help="with cpu, the GPU tests are skipped")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and (reason := environment.no_gpu()):
        sys.stderr.write(f"gpu_report.py: {reason}\n")
        return 1
    recorder = Recorder(args.out / FILE, environment.gpu_environment(device))
    tests = str(ROOT / "tests" / "test_gpu.py")
    plugin = ["-p", "tests.support.gpu_report", "--maxschedchunk", "1"]
    options = ["-m", "gpu", "-n", "0", "-rs", *plugin, tests, *args.pytest]
    return int(pytest.main(options, plugins=[recorder]))


if __name__ == "__main__":
    raise SystemExit(main())
