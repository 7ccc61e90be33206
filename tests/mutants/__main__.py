"""Plant known faults, one at a time, and check that the tests find each of them.

Run ``python -m tests.mutants`` from the root of a checkout, in the environment of its tests. Each
fault goes into a copy of the checkout in a temporary folder, where its own few tests run. The
result is ``tests/mutants/table.md``. The exit status is 1 if a fault is not caught.

The faults are in ``*.txt`` beside this file, one paragraph for each::

    name: what is broken
    @ file.py                      only where the code below is in several files
    - the code to replace, which occurs once in the package or in reference/
    + what replaces it; without such a line the code is deleted
    > test_file.py -k expression   arguments of pytest; a file of tests is found by its name
"""

# ruff: noqa: T201  this is a script
import argparse
import re
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

from tests.mutants.process import run_pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "out", "demo_output")
# Code that cannot be loaded says nothing about the tests.
NOT_LOADED = re.compile(r"SyntaxError|ImportError|ModuleNotFoundError|NameError")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - (.*))?$", re.MULTILINE)
SECONDS = 600  # for the tests of one fault


@dataclass
class Fault:
    """A fault to plant."""

    name: str
    what: str
    lines: dict[str, list[str]] = field(default_factory=dict)

    def text(self, mark: str) -> str:
        """Return the text of the lines that begin with ``mark``."""
        return "\n".join(self.lines.get(mark, []))

    def target(self, root: Path) -> Path:
        """Return the file that holds the code to replace, or raise LookupError."""
        found = []
        for folder in ("lens_kernels", "reference"):
            for path in (root / folder).rglob(self.text("@") or "*.py"):
                found += [path] * path.read_text().count(self.text("-"))
        if len(found) != 1:
            raise LookupError(f"the code occurs {len(found)} times")
        return found[0]

    def arguments(self, root: Path) -> list[str]:
        """Return the arguments of pytest, or raise LookupError."""
        arguments = []
        for word in shlex.split(self.text(">")):
            name, *rest = word.split("::")
            if name.endswith(".py"):
                paths = [p for p in (root / "tests").rglob(name) if "benchmarks" not in p.parts]
                if len(paths) != 1:
                    raise LookupError(f"{name} names {len(paths)} files of tests")
                word = "::".join([str(paths[0].relative_to(root)), *rest])
            arguments.append(word)
        return arguments


def read_faults() -> list[Fault]:
    """Return the faults of all lists."""
    faults = []
    for path in sorted(HERE.glob("*.txt")):
        for paragraph in path.read_text().strip().split("\n\n"):
            head, *body = paragraph.splitlines()
            fault = Fault(*head.split(": ", 1))
            for line in body:
                fault.lines.setdefault(line[0], []).append(line[2:])
            faults.append(fault)
    return faults


def plant(fault: Fault, root: Path) -> tuple[str, str]:
    """Plant a fault in a copy, and return the test that fails, "" for none, and the reason."""
    try:
        path, arguments = fault.target(root), fault.arguments(root)
        whole = path.read_text()
        planted = whole.replace(fault.text("-"), fault.text("+"))
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
        return "", f"pytest, status {status}: {output.strip().splitlines()[-1]}"
    reason = failed[2] or ""
    return "" if NOT_LOADED.search(reason) else failed[1], reason


def main() -> int:
    """Plant the faults; return 1 if any is not caught."""
    parser = argparse.ArgumentParser(
        "python -m tests.mutants", None, __doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Plant these; write no table.")
    parser.add_argument("--list", action="store_true", help="Show the faults and plant none.")
    parser.add_argument("--jobs", type=int, default=1, help="Faults at a time. Default: 1.")
    options = parser.parse_args()
    faults = [f for f in read_faults() if not options.only or f.name in options.only]
    if options.list:
        print("\n".join(f"{fault.name:<32} {fault.what}" for fault in faults))
        return 0
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

        tests = list(pool.map(attempt, faults))
        # A test that fails without a fault as well has caught nothing.
        _, output = (
            run_pytest(copies.get(), sorted({*tests} - {""}), None) if any(tests) else (0, "")
        )
    broken = {match[1] for match in FAILED.finditer(output)}
    caught = ["" if test in broken else test for test in tests]
    rows = ["| fault | what is broken | caught by |", "|---|---|---|"]
    for fault, test in zip(faults, caught, strict=True):
        rows.append(f"| {fault.name} | {fault.what} | {f'`{test}`' if test else 'NOT CAUGHT'} |")
    if not options.only:
        (HERE / "table.md").write_text("\n".join(rows) + "\n")
    print(f"{len(faults)} faults, {caught.count('')} not caught", *sorted(broken), sep="\n")
    return int(not all(caught))


if __name__ == "__main__":
    sys.exit(main())
