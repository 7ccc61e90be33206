"""The site shows every page, and its API page documents every public name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from typing import Any

import pytest

import lens_kernels
from tests.support import ROOT
from tests.support.documents import NOTEBOOKS, PAGES

NAV = re.findall(r"^ +- [^:#]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
ENTRIES = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)

# Classes of results, whose docstrings need no ``Raises``: users do not construct them.
RESULTS = {
    "lens_kernels.DistillationOutput",
    "lens_kernels.Plan",
    "lens_kernels.hf.training.data.Examples",
    "lens_kernels.hf.training.objective.Outcome",
    "lens_kernels.hf.inspection.reading.Comparison",
    "lens_kernels.hf.inspection.inspect.LensInspection",
    "lens_kernels.hf.inspection.results.Inspection",
    "lens_kernels.hf.inspection.results.Passage",
    "lens_kernels.hf.inspection.reading.Reading",
}


def test_the_navigation_names_every_page_once():
    assert sorted(NAV) == sorted(str(page.relative_to(ROOT)) for page in PAGES)


def test_the_api_page_names_every_public_object_once():
    pytest.importorskip("transformers")
    hf = importlib.import_module("lens_kernels.hf")
    public = {f"lens_kernels.{x}" for x in lens_kernels.__all__} - {"lens_kernels.__version__"}
    public |= {f"lens_kernels.hf.{x}" for x in hf.__all__}
    assert public <= {*ENTRIES} and len({*ENTRIES}) == len(ENTRIES)


def documented(path: str):
    """Return the object that the API page documents. Skip the test if its package is missing."""
    module, _, name = path.rpartition(".")
    if ".hf." in path:
        pytest.importorskip("transformers")
    if module.endswith(".trl"):
        pytest.importorskip("trl")
    return getattr(importlib.import_module(module), name)


def unnamed(function: Any, *texts: str) -> set[str]:
    """Return the names of a function's parameters that no text describes.

    The lists of errors do not count, because they do not explain arguments.
    """
    pattern = re.compile(r"``\*{0,2}(\w+)|^ *\*{0,2}(\w+): ", re.MULTILINE)
    named = {
        name for x in texts for pair in pattern.findall(x.split("Raises:")[0]) for name in pair
    }
    return {*inspect.signature(function).parameters} - named - {"self", "cls"}


def methods(entry: type) -> dict[str, Any]:
    """Return the public methods of a class that are not documented by a base class."""
    own = {name: getattr(x, "__func__", x) for name, x in vars(entry).items() if name[0] != "_"}
    own = {name: getattr(x, "fget", x) for name, x in own.items()}
    own = {name: inspect.unwrap(x) for name, x in own.items() if callable(x)}
    return {
        name: x
        for name, x in own.items()
        if inspect.isfunction(x) and not any(hasattr(base, name) for base in entry.__mro__[1:])
    }


@pytest.mark.parametrize("path", ENTRIES)
def test_the_docstring_says_what_a_reader_needs(path):
    """A docstring names every argument and all errors. Config options have help texts instead."""
    entry = documented(path)
    text = inspect.cleandoc(entry.__doc__ or "")
    # If a dataclass or NamedTuple has no docstring, Python takes its signature as the docstring.
    assert text and not text.startswith(f"{entry.__name__}(")
    if not path.endswith(("Config", "Trainer")):
        assert not unnamed(entry, text)
    assert path in RESULTS or "Raises:" in text
    if inspect.isclass(entry):
        for name, method in methods(entry).items():
            assert method.__doc__, name
            assert not unnamed(method, method.__doc__, text), name


def test_every_option_of_the_config_has_a_description():
    pytest.importorskip("transformers")
    from transformers import TrainingArguments

    from lens_kernels.hf import LensDistillConfig

    own = {x.name: x for x in dataclasses.fields(LensDistillConfig)}
    own = {name: x for name, x in own.items() if name in vars(LensDistillConfig)["__annotations__"]}
    assert len(own) > 10 and issubclass(LensDistillConfig, TrainingArguments)
    assert all(len(x.metadata["help"]) > 15 for x in own.values() if not x.name.startswith("_"))


@pytest.mark.slow
def test_the_site_builds_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.html")}
    loads = r"<(?:script|link|img|iframe|source)[^>]*(?:src|href)=\"?(?:https?:)?//"
    assert not [name for name, text in pages.items() if re.search(loads, text)]
    for name, text in pages.items():
        for link in re.findall(r"(?:src|href)=\"?([^\"# >]+)", text):
            if name != "404.html" and not link.startswith(("https:", "http:", "data:", "mailto:")):
                assert (tmp_path / name).parent.joinpath(link).exists(), (name, link)
    assert {f"docs/notebooks/{path.stem}.html" for path in NOTEBOOKS} < {*pages}
    for path in ENTRIES:  # an entry is empty if no paragraph follows its heading
        _, heading, after = pages["docs/api.html"].partition(f'id="{path}"')
        assert heading and "<p>" in after.partition('<div class="doc doc-object')[0], path
