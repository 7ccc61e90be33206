"""Run measurements and tests on a GPU within a few minutes, the most important steps first.

    python benchmarks/gpu_day.py --minutes 9 --out DIR
    python benchmarks/gpu_day.py --minutes 9 --out DIR --steps parity    one step

1. The time, peak memory and kernels of a lens_kernels step at the sizes of three models, and the
   time of its GEMMs alone. Predicted times are printed next to the measured ones.
2. Time, memory and kernels at the size of Llama-3, of a second stream and of other implementations.
   Packages that are not installed are skipped.
3. The GPU tests, in parallel.
4. Two more implementations at the size of Llama-3, if time is left.

Each step is a process with a time limit. A step that fails or hangs is recorded, and the next one
starts. A step starts only if a third of its limit is left. ``speed.csv`` and ``tests.csv`` hold the
results, ``steps.csv`` holds the outcome of each step, and ``log.txt`` holds all output. Each result
is written as soon as it is known. The exit status is 0 if a lens_kernels step was measured. With
more than 9 minutes, the limits are higher.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:
    import checkout  # noqa: F401

from benchmarks import speed_gpu
from benchmarks.support import environment, tables

MINUTES = 9
RESERVE = 15  # seconds for starting this program and printing its last table
OURS = {"qwen2.5": 75, "llama3": 60, "gpt2": 50}
PEERS = {"liger": 60, "two_streams": 40, "liger_hopper": 45, "orda": 90, "dense": 40, "trl": 40}
PARITY_SECONDS = 400
LATER = {"triton": 60, "liger_fused": 40}
FILE, LOG, TESTS = "steps.csv", "log.txt", "tests.csv"
COLUMNS = "step status seconds limit_s note"


@dataclass(frozen=True)
class Step:
    """A process to run, with a name and a time limit in seconds."""

    name: str
    seconds: float
    command: Sequence[str]


def steps(args: argparse.Namespace) -> list[Step]:
    """Return the steps in order of importance."""
    where = ["--out", str(args.out), "--device", args.device]
    speed = [sys.executable, str(environment.ROOT / "benchmarks" / "speed_gpu.py")]
    tiny = ["--tiny"] * args.tiny
    ours = [
        Step(shape, seconds, [*speed, shape, *where, *tiny, "--pairs", "1", "5", "--parts"])
        for shape, seconds in OURS.items()
    ]
    against = [*speed, "llama3", *where, *tiny, "--rounds", "5", "--contenders"]
    peers, later = (
        [Step(f"llama3 {key}", seconds, [*against, key, "torch"]) for key, seconds in group.items()]
        for group in (PEERS, LATER)
    )
    tests = [sys.executable, "-m", "tests.support.gpu_report", *where]
    few = ["-k", "kernels_are_compiled"] * args.tiny
    parity = [*tests, "--", "-n", str(args.processes), "-q", *few]
    return [*ours, *peers, Step("parity", PARITY_SECONDS, parity), *later]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps. Return 0 if a step of lens_kernels was measured, else 1."""
    args = parse(argv)
    end = time.monotonic() + 60 * args.minutes - RESERVE
    device = torch.device(args.device)
    if device.type == "cuda" and (reason := environment.no_gpu()):
        raise SystemExit(f"gpu_day.py: {reason}")
    if (args.out / FILE).exists():
        raise SystemExit(f"gpu_day.py: {args.out} holds another run; pass another folder to --out")
    day = Day(args.out, environment.gpu_environment(device), end)
    with stopped_by_signals():
        try:
            for step in steps(args):
                if not args.steps or step.name in args.steps:
                    day.run(step, step.seconds * max(1, args.minutes / MINUTES))
        finally:
            day.show()
    return 0 if day.measured() else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command-line arguments."""
    parser = environment.parser(__doc__)
    parser.set_defaults(device="cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="default %(default)s")
    parser.add_argument("--steps", nargs="+", help="run only these steps, named as in steps.csv")
    processes = min(12, os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=processes, help="processes for the tests")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes that test the script")
    return parser.parse_args(argv)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turn signals into SystemExit, so that the running step also ends when this program ends."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Day:
    """Runs steps until the time is over, and writes their results to a folder."""

    def __init__(self, out: Path, where: dict[str, str], end: float) -> None:
        """Create the folder. Steps must end at the time ``end``."""
        self.out, self.where, self.end = out, where, end
        self.steps: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)

    def run(self, step: Step, limit: float) -> None:
        """Run a step if enough time is left, and record how it ended."""
        left = self.end - time.monotonic()
        if left < limit / 3:
            self.record(step, "not started", 0, limit, f"{max(0, left):.0f} s are left")
            return
        limit = min(limit, left)
        print(f"{step.name}: at most {limit:.0f} s", flush=True)
        start = time.monotonic()
        status = "interrupted"
        log = self.out / LOG
        with log.open("ab") as output:
            output.write(f"\n== {step.name}: {' '.join(step.command)}\n".encode())
            output.flush()
            begun = output.tell()
            # Give the process a session of its own, so that ``kill`` can end all of its children.
            process = subprocess.Popen(
                step.command, cwd=environment.ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
                names = {0: "done", speed_gpu.SKIPPED: "skipped"}
                status = names.get(code, f"failed with status {code}")
            except subprocess.TimeoutExpired:
                status = "timed out"
            finally:
                kill(process)
                lines = log.read_bytes()[begun:].decode(errors="replace").split("\n")
                last = " | ".join([" ".join(line.split()) for line in lines if line.strip()][-3:])
                note = "" if status == "done" else last[-300:]
                self.record(step, status, time.monotonic() - start, limit, note)

    def record(self, step: Step, status: str, seconds: float, limit: float, note: str) -> None:
        """Add how a step ended to the list and to ``steps.csv``."""
        known = {"step": step.name, "status": status, "note": note}
        times = {"seconds": f"{seconds:.1f}", "limit_s": f"{limit:.1f}"}
        self.steps.append(tables.row(COLUMNS, known, times))
        tables.append_csv(self.out / FILE, self.steps[-1] | self.where)
        print(f"  {status} {note}", flush=True)

    def measured(self) -> bool:
        """Return whether the CSV has a time of the ``torch`` backend."""
        rows = tables.read_csv(self.out / speed_gpu.FILE)
        return any(row["contender"] == "torch" and row["median_ms"] for row in rows)

    def show(self) -> None:
        """Print how steps and tests ended, and the measured and predicted times."""
        print(f"\n{self.where['device']}, torch {self.where['torch']}")
        if rows := tables.read_csv(self.out / speed_gpu.FILE):
            tables.print_rows(rows, speed_gpu.SHOWN.split())
        tests = tables.read_csv(self.out / TESTS)
        for row in tests:
            if row["outcome"] == "failed":
                print(f"failed: {row['test']} {row['note'][:200]}")
        counts = Counter(row["outcome"] for row in tests)
        print("tests:", ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "none")
        if self.steps:
            tables.print_rows(self.steps)
        print(f"{self.out}", flush=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        print(f"  process {process.pid} does not end", flush=True)


if __name__ == "__main__":
    sys.exit(main())
