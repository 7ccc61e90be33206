"""Plant known faults, one at a time, and check that the tests find each of them.

Run ``python -m tests.mutants`` from the root of a checkout, with the packages for its tests
installed. Each fault is planted in a temporary copy of the checkout, where the fault's tests then
run. The results are written to ``tests/mutants/table.md``. The exit status is 1 if a fault is not
caught.

The faults are in the ``*.txt`` files beside this file, whose format ``faults.py`` describes.
``--list`` only lists the faults, and marks those that no longer fit the code.
"""

# ruff: noqa: T201  this script prints
import argparse
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from tests.mutants.faults import HERE, Fault, read_faults
from tests.mutants.process import run_pytest

ROOT = HERE.parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "out", "demo_output")
# If the code cannot be imported, the tests have not caught the fault.
NOT_LOADED = re.compile(r"SyntaxError|ImportError|ModuleNotFoundError|NameError")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - (.*))?$", re.MULTILINE)
SECONDS = 600  # time limit in seconds for the tests of one fault


def plant(fault: Fault, root: Path) -> tuple[str, str]:
    """Plant a fault in a copy of the checkout, and run its tests.

    Return the first test that fails and its error. The test is "" if none fails.
    """
    try:
        path, arguments = fault.target(root), fault.arguments(root)
        whole = path.read_text()
        planted = whole.replace(fault.text("-"), fault.text("+"))
        if path.suffix == ".py":
            compile(planted, path, "exec")
        path.write_text(planted)
        try:
            status, output = run_pytest(root, ["-x", *arguments], SECONDS)
        finally:
            path.write_text(whole)
    except (LookupError, SyntaxError) as error:
        return "", f"{type(error).__name__}: {error}"
    failed = FAILED.search(output)
    if status != 1 or failed is None:
        return "", f"pytest, status {status}: {output.strip()[-100:]}"
    reason = failed[2] or ""
    return "" if NOT_LOADED.search(reason) else failed[1], reason


def main() -> int:
    """Plant all chosen faults, and return 1 if any of them is not caught."""
    parser = argparse.ArgumentParser(
        "python -m tests.mutants", None, __doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="Plant only these faults; keep the table's other rows.",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="List the faults; mark faults that no longer fit the code.",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="Number of faults planted in parallel. Default: 1."
    )
    options = parser.parse_args()
    faults = {fault.name: fault for fault in read_faults()}
    if options.only:
        faults = {name: faults[name] for name in options.only}
    if options.list:
        unfit = [fault.misfit(ROOT) for fault in faults.values()]
        for fault, why in zip(faults.values(), unfit, strict=True):
            print(f"{fault.name:<32} {fault.what}" + (f"  ({why.upper()})" if why else ""))
        return int(any(unfit))
    copies: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for i in range(options.jobs):
            copies.put(shutil.copytree(ROOT, Path(folder, str(i)), ignore=LEFT_OUT))

        def attempt(fault: Fault) -> str:
            copy = copies.get()
            test, reason = plant(fault, copy)
            copies.put(copy)
            print(f"{fault.name:<32} {test or 'NOT CAUGHT'}  ({reason[:100]})", flush=True)
            return test

        tests = list(pool.map(attempt, faults.values()))
        if not any(tests):
            return 1
        # A test does not catch a fault if it also fails without the fault.
        status, output = run_pytest(copies.get(), sorted({*tests} - {""}), None)
    broken = {match[1] for match in FAILED.finditer(output)}
    caught = ["" if test in broken else test for test in tests]
    known = (HERE / "table.md").read_text().splitlines()
    rows = {row.split(" | ")[0].strip("| "): row for row in known[2:]}
    for fault, test in zip(faults.values(), caught, strict=True):
        said = f"`{test}`" if test else "NOT CAUGHT"
        rows[fault.name] = f"| {fault.name} | {fault.what} | {said} |"
    kept = [rows[fault.name] for fault in read_faults() if fault.name in rows]
    (HERE / "table.md").write_text("\n".join([*known[:2], *kept]) + "\n")
    print(f"{len(faults)} faults, {caught.count('')} not caught", *sorted(broken), sep="\n")
    return int(status != 0 or not all(caught))


if __name__ == "__main__":
    sys.exit(main())
