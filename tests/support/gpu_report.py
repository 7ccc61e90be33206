"""Runs the GPU tests and writes a CSV with a line for each test, with versions and device.

Run it with ``make test-gpu``, or with more arguments for pytest after ``--``: ``python -m
tests.support.gpu_report --out DIR -- -k parity``
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

# The outcomes of a test's phases, from best to worst. The worst one is the test's outcome.
ORDER = ("passed", "skipped", "failed")


class Recorder:
    """A pytest plugin that records the outcome of every test."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        row = self.rows.setdefault(
            report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0, "note": ""}
        )
        row["seconds"] += report.duration
        if ORDER.index(report.outcome) > ORDER.index(row["outcome"]):
            row["outcome"], row["note"] = report.outcome, note(report)


def note(report: Any) -> str:
    """Return one line that says why a test was skipped or failed."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (str(crash.message if crash else report.longrepr).strip() or "?").splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests and return pytest's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=environment.DATA / "gpu", metavar="DIR")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest")
    args = parser.parse_args(argv)
    if reason := environment.no_gpu():
        sys.stderr.write(f"gpu_report.py: {reason}\n")
        return 1
    device = torch.device("cuda")
    recorder = Recorder()
    options = ["-m", "gpu", "-n", "0", "-rs", str(ROOT / "tests"), *args.pytest]
    status = int(pytest.main(options, plugins=[recorder]))
    path = args.out / environment.file_name("tests", device)
    if recorder.rows:
        where = environment.gpu_environment(device)
        tables.write_csv(
            path,
            [row | {"seconds": f"{row['seconds']:.2f}"} | where for row in recorder.rows.values()],
        )
        sys.stdout.write(f"{path}\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
