"""The documents' examples run, and the files that they name exist."""

from __future__ import annotations

import doctest
import re

import pytest

from benchmarks import kernel_report
from lens_kernels import functional
from tests.support import ROOT

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def test_docstring_examples_run():
    failed, tried = doctest.testmod(functional)
    assert tried > 0 and failed == 0


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(readme_blocks())))
def test_readme_examples_run(number, tmp_path, monkeypatch):
    code = readme_blocks()[number]
    if "lens_kernels.hf" in code:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"README.md, example {number}", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_named_in_a_document_exists(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"[`(]((?:lens_kernels|reference|benchmarks|tests)/[\w/.]+\w/?)[`)]", text)
    assert named
    missing = [p for p in named if not (ROOT / p).exists() and "/out/" not in p]
    assert not missing, f"{document} names {missing}"


def test_every_file_named_in_the_code_exists():
    for source in [*ROOT.glob("lens_kernels/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        named = re.findall(r"``?((?:reference|tests|benchmarks)/[\w/]+\.py)", source.read_text())
        assert all((ROOT / p).exists() for p in named), (source, named)


def test_the_readme_s_table_of_plans_matches_plan():
    assert f"\n{kernel_report.readme_table()}\n" in (ROOT / "README.md").read_text()


def test_changelog_and_version_agree():
    from lens_kernels import __version__

    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {__version__}" in text or "## Unreleased" in text
