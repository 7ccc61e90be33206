"""The built wheel contains only the package, and works with its declared dependencies alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lens_kernels import __version__
from tests.support import ROOT

FILES = ["pyproject.toml", "setup.py", "README.md", "LICENSE"]
FOLDERS = ["lens_kernels", "reference", "benchmarks", "tests"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
SMOKE = ROOT / "tests" / "support" / "smoke.py"


def call(*command: str | Path, folder: Path) -> str:
    """Run a command in a folder and return its output.

    Its environment hides this checkout from Python, and turns Triton's interpreter off.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel offline, from a copy of the project, because a build writes into the source
    folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    call(sys.executable, "-c", BUILD, out, folder=source)
    (path,) = out.iterdir()
    return path


def needed(name: str) -> set[str]:
    """Return the name of an installed package, and the names of all its installed dependencies."""
    found, left = set(), [name]
    while left:
        name = left.pop()
        try:
            requirements = metadata.requires(name) or []
        # CPU builds of torch declare dependencies that are not installed.
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            parsed = map(Requirement, requirements)
            left += [r.name for r in parsed if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Return the bin folder of a new environment with the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (described,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(described).decode().splitlines()
    declared = [Requirement(x.partition(": ")[2]) for x in lines if x.startswith("Requires-Dist")]
    for requirement in declared:
        # Requirements with a marker belong to optional extras.
        if requirement.marker is None:
            for name in needed(requirement.name):
                distribution = metadata.distribution(name)
                for top in {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}:
                    if not (site / top).exists():
                        (site / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    call(*pip, "-q", "--no-index", "--no-deps", wheel, folder=folder)
    return folder / "bin"


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    package = ROOT / "lens_kernels"
    files = {p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    names = zipfile.ZipFile(wheel).namelist()
    packed = {ROOT / name for name in names if not name.startswith(f"lens_kernels-{__version__}")}
    assert packed == files


def test_the_wheel_computes_a_loss_with_only_its_dependencies(environment, tmp_path):
    where = call(environment / "python", SMOKE, folder=tmp_path)
    assert where.startswith(str(environment.parent))


def test_the_command_of_the_wheel_describes_the_machine(environment, tmp_path):
    shown = call(environment / "lens-kernels", "env", folder=tmp_path)
    assert shown.startswith(f"lens_kernels {__version__}")
    assert "transformers  not installed" in shown
