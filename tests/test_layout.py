"""Imports go in one direction, and only one module uses private names of other libraries."""

from __future__ import annotations

import ast
import inspect
import re
from graphlib import TopologicalSorter

import pytest

from tests.support import ROOT

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "lens_kernels").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
HF = "lens_kernels.hf"
# Each folder of lens_kernels/hf, and the folders that it may import from.
BELOW = {
    "model": set(),
    "cache": set(),
    "training": {"model", "cache"},
    "evaluation": {"model", "training"},
    "inspection": {"model", "training"},
    "integrations": {"training"},
}


def imported(name: str) -> set[str]:
    """Return the package's modules that a module imports, also inside functions or for types."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in SOURCES else node.module for member in members}
    return found & SOURCES.keys()


def test_imports_form_no_circle():
    arrows = {name: imported(name) for name in SOURCES}
    assert sum(map(len, arrows.values())) > len(SOURCES)
    # prepare() raises CycleError if the imports form a cycle.
    TopologicalSorter(arrows).prepare()


def test_only_the_command_line_imports_hf():
    users = {name for name in SOURCES for other in imported(name) if other.startswith(HF)}
    assert {name for name in users if not name.startswith(HF)} == {"lens_kernels.cli"}


def test_the_folders_of_hf_import_one_way():
    inner = [name for name in SOURCES if name.startswith(f"{HF}.")]
    assert {name.split(".")[2] for name in inner} == BELOW.keys()
    for name in inner:
        folder = name.split(".")[2]
        targets = {x.split(".")[2] for x in imported(name) if x.startswith(f"{HF}.")}
        assert targets <= BELOW[folder] | {folder}, name


# Methods of NamedTuple that are public, although their names begin with an underscore.
DOCUMENTED = {"_replace", "_asdict", "_fields"}


def is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


def defined(tree: ast.Module) -> set[str]:
    """Return all names that a file defines: functions, classes, variables, ``self`` attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
    return names


def private_names(tree: ast.Module) -> set[str]:
    """Return the names with a leading underscore that a file reads, sets or imports."""
    names: set[object] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {*str(node.module).split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
                names |= {x.value for x in node.args if isinstance(x, ast.Constant)}
    return {str(name) for name in names if is_private(name)}


OURS = set().union(*map(defined, TREES.values())) | DOCUMENTED


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "lens_kernels.compat"])
def test_no_private_name_of_another_library_outside_compat(name):
    assert private_names(TREES[name]) <= OURS


def test_private_names_are_found():
    code = "from torch._C import x\nmodel._hooks = getattr(y, '_z', 1)\nself._own = t._replace(a=1)"
    assert private_names(ast.parse(code)) == {"_C", "_hooks", "_z", "_own", "_replace"}
    assert defined(ast.parse(code)) == {"_own"}


@pytest.mark.hf
def test_no_private_name_of_a_base_is_used_outside_compat():
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainingArguments

    from lens_kernels.hf import LensDistillConfig, LensDistillTrainer

    for own, base in ((LensDistillTrainer, Trainer), (LensDistillConfig, TrainingArguments)):
        theirs = {*re.findall(r"\bself\.(\w+)", inspect.getsource(base)), *dir(base)}
        source = ast.parse(inspect.getsource(own))
        assert not (private_names(source) | {*filter(is_private, vars(own))}) & theirs - DOCUMENTED


def test_benchmarks_keep_private_names_in_their_own_compat():
    trees = {p: ast.parse(p.read_text()) for p in (ROOT / "benchmarks").rglob("*.py")}
    ours = OURS.union(*map(defined, trees.values()))
    for path, tree in trees.items():
        assert path.name == "compat.py" or private_names(tree) <= ours, path
    assert {"_dynamo", "_schema"} <= private_names(trees[ROOT / "benchmarks/support/compat.py"])
