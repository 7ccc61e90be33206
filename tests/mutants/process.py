"""Runs pytest in a new process, which starts fast because large libraries are already loaded."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

PROCESSES = multiprocessing.get_context("forkserver")
LOADED = ["pytest", "torch._dynamo", "triton.language", "transformers.trainer", "peft"]


def run_pytest(root: Path, arguments: list[str], timeout: float | None) -> tuple[int, str]:
    """Run pytest in the folder ``root`` and return its exit status and output."""
    # The fork server needs the environment variables when it starts, because it loads the
    # libraries.
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    PROCESSES.set_forkserver_preload(LOADED)
    log = root.with_suffix(".log")
    process = PROCESSES.Process(target=_pytest, args=(root, arguments, log))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        return -1, f"timed out after {timeout} s"
    return process.exitcode, log.read_text()


def _pytest(root: Path, arguments: list[str], log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    sys.path.insert(0, str(root))
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    # Do not use compiled files. If a fault changes neither the time nor the size of a file, Python
    # would run the old compiled file.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    command = ["-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    sys.exit(int(pytest.main([*command, *arguments])))
