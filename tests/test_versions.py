"""The oldest versions that the tests install are the lower bounds in pyproject.toml."""

from __future__ import annotations

from packaging.requirements import Requirement
from packaging.version import Version

from tests.support import ROOT
from tests.support.documents import PROJECT


def test_every_lower_bound_is_tested():
    requirements = [*PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        requirements += extra
    bounds = {
        (requirement.name, Version(specifier.version))
        for requirement in map(Requirement, requirements)
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    assert bounds == {(name, Version(version)) for name, version in pins}


def test_the_workflow_covers_the_python_versions_of_the_classifiers():
    prefix = "Programming Language :: Python :: "
    named = [x.removeprefix(prefix) for x in PROJECT["classifiers"] if x.startswith(prefix)]
    assert f">={named[0]}" == PROJECT["requires-python"]
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert all(f'"{version}"' in workflow for version in (named[0], named[-1]))
