"""The origin of a measurement, for its CSV: code, versions, machine and date."""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from lens_kernels import version

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "out"
DATA = ROOT / "benchmarks" / "data"
CPU = torch.device("cpu")
PEERS = ("liger-kernel", "trl")


def parser(doc: str | None, on_device: bool = True, **numbers: int) -> argparse.ArgumentParser:
    """Return an argument parser with the options of all scripts, and with integer options."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder of the CSV")
    if on_device:
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, number in numbers.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=number, help="default %(default)s")
    return parser


def version_of(package: str) -> str:
    """Return the installed version of a package, or ``""`` if it is not installed."""
    return version.version_of(package) or ""


def environment(device: torch.device) -> dict[str, str]:
    """Return the machine, the versions and the commit of a measurement, as CSV columns."""
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
    """Return ``environment`` and the versions of the driver, CUDA or HIP, and Triton."""
    versions = {"driver": driver_version(device), "cuda": torch.version.cuda or ""}
    versions |= {"hip": torch.version.hip or "", "triton": version_of("triton")}
    return environment(device) | versions


def driver_version(device: torch.device) -> str:
    """Return the version of the GPU driver, or ``""`` if it is unknown."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        path = Path("/sys/module/amdgpu/version")
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""
    try:
        shown = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return shown.splitlines()[0].strip() if shown else ""


def no_gpu() -> str | None:
    """Return a message if there is no GPU, else None."""
    if torch.cuda.is_available():
        return None
    return f"this needs a GPU, but torch {torch.__version__} finds none"


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    if "model name" not in found:
        return platform.processor() or platform.machine()
    # Virtual machines use the same name for several generations of processors, so family and model
    # are added.
    numbers = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return ", ".join([found["model name"].strip(), *numbers])


def commit() -> str:
    """Return the last commit that changed the measured code.

    The suffix ``-dirty`` marks code with uncommitted changes.
    """
    git, code = ("git", "-C", str(ROOT)), ("--", "lens_kernels", "benchmarks/*.py")
    try:
        changed = _output(*git, "status", "--porcelain", *code)
        last = _output(*git, "log", "-1", "--format=%h", "--abbrev=12", *code).strip()
        return last + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
