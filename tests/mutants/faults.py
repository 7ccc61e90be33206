"""Reads the files that list faults. Each paragraph of a ``*.txt`` file describes one fault.

A paragraph has these lines::

    name: what is broken
    @ file.py                      only if the code below occurs in several files; another file
                                   than one of the package or of reference/ needs its whole path
    - the text to replace, which occurs once in these files
    + the new code; without this line, the old code is deleted
    > test_file.py -k expression   arguments for pytest, which name a test file without its folder
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass
class Fault:
    """A fault to plant: its name, its description, and the lines of its paragraph."""

    name: str
    what: str
    lines: dict[str, list[str]] = field(default_factory=dict)

    def text(self, mark: str) -> str:
        """Return all lines of the fault that start with ``mark``, without the mark."""
        return "\n".join(self.lines.get(mark, []))

    def target(self, root: Path) -> Path:
        """Return the file that contains the text to replace, or raise LookupError."""
        name, found = self.text("@") or "*.py", []
        if (root / name).is_file():
            paths = [root / name]
        else:
            paths = [
                x for folder in ("lens_kernels", "reference") for x in (root / folder).rglob(name)
            ]
        for path in paths:
            found += [path] * path.read_text().count(self.text("-"))
        if len(found) != 1:
            raise LookupError(f"the text to replace occurs {len(found)} times, expected once")
        return found[0]

    def misfit(self, root: Path) -> str:
        """Return the reason why the fault does not fit the code, or an empty string."""
        try:
            self.target(root), self.arguments(root)
        except LookupError as error:
            return str(error)
        return ""

    def arguments(self, root: Path) -> list[str]:
        """Return the fault's arguments for pytest, with full paths of files.

        Raise LookupError unless the name of a test file fits exactly one file.
        """
        arguments = []
        for word in shlex.split(self.text(">")):
            name, *rest = word.split("::")
            if name.endswith(".py"):
                paths = [p for p in (root / "tests").rglob(name) if "benchmarks" not in p.parts]
                if len(paths) != 1:
                    raise LookupError(f"{len(paths)} test files are called {name}, expected one")
                word = "::".join([str(paths[0].relative_to(root)), *rest])
            arguments.append(word)
        return arguments


def read_faults() -> list[Fault]:
    """Return the faults of all ``*.txt`` files."""
    faults = []
    for path in sorted(HERE.glob("*.txt")):
        for paragraph in path.read_text().strip().split("\n\n"):
            head, *body = paragraph.splitlines()
            fault = Fault(*head.split(": ", 1))
            for line in body:
                fault.lines.setdefault(line[0], []).append(line[2:])
            faults.append(fault)
    return faults
