"""What every benchmark shares: the record of where it ran, the timing protocol, tables and CSV."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "out"
PEERS = ("liger-kernel", "trl")


def version_of(package: str) -> str:
    """Return the installed version of a distribution, or ``""``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment(device: torch.device) -> dict[str, str]:
    """Return what a number depends on besides the job: code, versions, machine and date."""
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        **{package.replace("-", "_"): version_of(package) for package in PEERS},
        "python": platform.python_version(),
        "commit": commit(),
        "date_utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


def gpu_environment(device: torch.device) -> dict[str, str]:
    """Return the same, and what a number depends on besides on a GPU."""
    versions = {"driver": driver_version(device), "cuda": torch.version.cuda or ""}
    versions |= {"hip": torch.version.hip or "", "triton": version_of("triton")}
    return environment(device) | versions


def driver_version(device: torch.device) -> str:
    """Return the version of the GPU's driver, or ``""``."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        path = Path("/sys/module/amdgpu/version")
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return shown.splitlines()[0].strip() if shown else ""


def no_gpu() -> str | None:
    """Say that there is no GPU, or return None."""
    if torch.cuda.is_available():
        return None
    return f"this runs on a GPU, and torch {torch.__version__} finds none"


def file_name(kind: str, device: torch.device) -> str:
    """Return the name of the CSV with results of a kind on a device."""
    return f"{kind}-{re.sub('[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.csv"


def device_name(device: torch.device) -> str:
    """Return the model of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    if "model name" not in found:
        return platform.processor() or platform.machine()
    # Names of virtual machines' processors do not tell one generation from another.
    numbers = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return ", ".join([found["model name"].strip(), *numbers])


def commit() -> str:
    """Return the last commit of the code that is measured, ``-dirty`` if it was changed since."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    code = ("lens_kernels", "benchmarks/*.py")
    try:
        changed = git("status", "--porcelain", "--", *code)
        last = git("log", "-1", "--format=%h", "--abbrev=12", "--", *code)
        return last + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class Timing:
    """Wall times of one contender, one for each round."""

    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.times_ms)


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    progress: bool = True,
) -> dict[str, Timing]:
    """Time functions in rounds, each once per round, after one unmeasured round.

    Interleaving spreads a disturbance of the machine over all of them, and each round starts with
    another one. Caches need no flushing: the heads alone exceed every cache.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name in rotated([*functions], number):
            elapsed = seconds(functions[name], device)
            if number:
                times[name].append(elapsed * 1e3)
            label = f"round {number} of {rounds}" if number else "warm-up"
            if progress:
                print(f"  {label}: {name} {elapsed:.2f} s", flush=True)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Return the order of a round, which each time starts with the next one."""
    shift = number % len(names)
    return [*names[shift:], *names[:shift]]


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the time of one call, the device's work included; on a GPU by its own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def matmul_rate(device: torch.device) -> float:
    """Return fp32 operations per second of a matrix product as large as those of a lens."""
    x, weight = torch.randn(512, 1024, device=device), torch.randn(8192, 1024, device=device)
    best = min(seconds(lambda: x @ weight.t(), device) for _ in range(5))
    return 2 * 512 * 1024 * 8192 / best


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, all with the same keys, units being part of the keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_own_csv(path: Path, conditions: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the rows that an earlier run left, whenever that was.

    Raises:
        RuntimeError: They were measured under other conditions.
    """
    rows = read_csv(path)
    for row in rows:
        for name, value in conditions.items():
            if name != "date_utc" and row.get(name) != str(value):
                raise RuntimeError(
                    f"{path} was measured with {name} {row.get(name)!r}, and this run has"
                    f" {str(value)!r}; move the file away, or pass another folder to --out"
                )
    return rows


def replaced_between(text: str, begin: str, end: str, content: str) -> str:
    """Return a document with what stands between two of its lines made anew.

    Raises:
        ValueError: It does not hold both lines in this order.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"the README must hold the lines {begin!r} and {end!r} in this order")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
