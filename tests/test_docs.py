"""The documents are true: links resolve, examples run, and the named commands and files exist."""

from __future__ import annotations

import ast
import csv
import doctest
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from benchmarks import kernel_report
from benchmarks.peers import bars
from lens_kernels import __version__, cli, functional, plan
from tests.support import ROOT, documents
from tests.support.documents import PAGES, PROJECT, Parsed

README = ROOT / "README.md"
CPU = ROOT / "benchmarks" / "data" / "cpu"
PYTHON = documents.blocks("python")
COMMANDS = list(documents.commands())
# Options in the documents that belong to other programs, such as pip, torchrun, pytest and git, and
# to the published code of DistillLens.
FOREIGN = {"--index-url", "--no-deps", "--nproc_per_node", "--help", "--only"}
FOREIGN |= {"--type", "--fkl-coeff", "--rkl-coeff", "--kd-ratio", "--lens-coeff", "--mse-coeff"}
FOREIGN |= {"--student-logit-lens", "--teacher-logit-lens", "--max-length"}
OPTIONAL = re.compile(r"^(?:from|import) (trl|liger_kernel)\b", re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_docstring_examples_run():
    failed, tried = doctest.testmod(functional)
    assert tried > 0 and failed == 0


# --- tests of pages and links


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_the_index_names_every_page():
    index = ROOT / "docs" / "README.md"
    pages = {page.name for page in index.parent.glob("*.md")} - {index.name}
    assert len(pages) > 5
    assert pages <= {*documents.links(index)}
    assert "docs/README.md" in documents.links(README)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    for link in documents.links(page):
        if link.startswith(("https://", "http://")):
            continue
        # On GitHub, the link ../../actions leads from the project's main page to its workflows.
        if link.startswith("../../actions/workflows/"):
            workflow = link.removeprefix("../../actions/").removesuffix("/badge.svg")
            assert (ROOT / ".github" / workflow).is_file(), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in documents.anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_named_on_a_page_exists(page):
    pattern = r"(?<![\w/])(?:lens_kernels|reference|benchmarks|tests|docs)/[\w/.]+\w/?"
    # The page of the benchmarks names data files relative to the folder of the benchmarks.
    here = re.findall(r"`(data/[\w/.]+)`", page.read_text())
    missing = [p for p in re.findall(pattern, page.read_text()) if not (ROOT / p).exists()]
    missing += [p for p in here if not (page.parent / p).exists()]
    assert not [p for p in missing if not p.startswith("benchmarks/out")], missing


def test_every_file_named_in_the_code_exists():
    for source in [*ROOT.glob("lens_kernels/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        named = re.findall(
            r"``?((?:reference|tests|benchmarks|docs)/[\w/]+\.(?:py|md))", source.read_text()
        )
        assert all((ROOT / p).exists() for p in named), (source, named)


def messages() -> list[str]:
    """Return all texts in the package's code, with "..." in place of the values in f-strings."""
    found = []
    for source in ROOT.glob("lens_kernels/**/*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "..." for x in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_explained_are_those_of_the_package():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    explained = re.findall(r"^\|[^`|]*`([^`]+)` ", page, re.MULTILINE)
    assert len(explained) > 10
    known = messages()
    for message in explained:
        pieces = [piece.strip(" '") for piece in message.split("...")]
        assert any(all(piece in text for piece in pieces) for text in known), message


# --- tests of examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with all files that the examples read.

    Tiny models replace the real models, under the same names.
    """
    pytest.importorskip("transformers")
    from tests.support import commands, tiny

    folder = tmp_path_factory.mktemp("examples")
    lines = [block.text.split("\n")[0] for block in PYTHON]
    real = [x.removeprefix(documents.DOWNLOAD) for x in lines if x.startswith(documents.DOWNLOAD)]
    names = {part for line in real for part in line.split(", ")}
    for number, name in enumerate(["student", "teacher", *sorted(names)]):
        tiny.model(layers=6, width=16, seed=number).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    commands.write_rows(folder / "train.jsonl", commands.ROWS)
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_examples_run(block, folder, monkeypatch):
    for package in OPTIONAL.findall(block.text):
        pytest.importorskip(package)
    monkeypatch.chdir(folder)
    exec(compile(block.text, str(block), "exec"), {})


# --- tests of commands


@pytest.fixture
def parsing(folder, monkeypatch):
    """Make commands stop after parsing. The current folder has the run.yaml that the pages show."""
    monkeypatch.chdir(folder)
    (options,) = documents.blocks("yaml")
    Path("run.yaml").write_text(options.text)
    documents.stop_after_parsing(monkeypatch)


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch):
    """Return the parser of one of this project's commands, or None for any other command."""
    if words[0] == "lens-kernels":
        with pytest.raises(Parsed) as end:
            cli.main(words[1:])
        return end.value.parser
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        script = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(Parsed) as end:
            script.main()
        return end.value.parser
    return None


def is_a_name(words: list[str]) -> bool:
    """Return whether the text is only a command's name, such as `lens-kernels train`."""
    return words[0] == "lens-kernels" and words[2:] in ([], ["--help"])


def test_every_command_is_shown():
    shown = {words[1] for _, words in COMMANDS if words[0] == "lens-kernels" and words[1:]}
    assert {*cli.COMMANDS} == shown


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[where[:60] for where, _ in COMMANDS])
def test_commands_are_understood(where, words, parsing, monkeypatch):
    if is_a_name(words):
        with pytest.raises(SystemExit) as end:
            cli.main([*words[1:2], "--help"])
        assert end.value.code == 0
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {*words[1:]} <= {*targets}
    elif words[:2] == ["pip", "install"]:
        for extras in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
            assert {*extras.split(",")} <= {*PROJECT["optional-dependencies"]}
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    else:
        name = " ".join(words[:2]) if words[0] == "lens-kernels" else Path(words[1]).name
        assert parsed(words, monkeypatch).prog == name


def test_options_in_the_text_exist(parsing, monkeypatch):
    known = {*FOREIGN, *cli._parser().known}
    for _, words in COMMANDS:
        if not is_a_name(words) and (parser := parsed(words, monkeypatch)):
            known |= {*parser._option_string_actions}
    for page in PAGES:
        named = re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", " ".join(documents.code_spans(page)))
        assert {*named} <= known, name(page)


def test_extras_in_the_text_exist():
    extras = {*PROJECT["optional-dependencies"]}
    for page in PAGES:
        named = re.findall(r"^\[(\w+)\]$", "\n".join(documents.code_spans(page)), re.MULTILINE)
        assert {*named} <= extras, name(page)


# --- tests of numbers and lists


def test_the_readme_says_which_versions_are_supported():
    text = README.read_text()
    prefix = "Programming Language :: Python :: "
    versions = [x.removeprefix(prefix) for x in PROJECT["classifiers"] if x.startswith(prefix)]
    extras = PROJECT["optional-dependencies"]
    bounds = dict(x.split(">=") for x in [*PROJECT["dependencies"], *extras["hf"]] if ">=" in x)
    assert f"python-{versions[0]}_to_{versions[-1]}-" in text
    assert f"torch-from_{bounds['torch']}-" in text
    assert f"licence-{PROJECT['license'].replace('-', '--')}-" in text
    assert (
        f"Python {versions[0]} to {versions[-1]}, torch {bounds['torch']} or later, transformers"
        f" {bounds['transformers']} or later"
    ) in " ".join(text.split())


def test_the_results_of_the_readme_are_those_of_the_data():
    text = README.read_text()
    with (CPU / "memory_vs_vocab.csv").open() as file:
        peaks = {
            (row["contender"], row["pairs"]): row["peak_with_gradients_mib"]
            for row in csv.DictReader(file)
            if row["vocab_entries"] == "131072" and row["method"] == "measured"
        }
    one, five = (
        {k: f"{float(x):.0f}" for (k, n), x in peaks.items() if n == i and x} for i in "15"
    )
    for peaks_of, basis in ((one, "measured, AMD"), (five, "measured, the same")):
        assert (
            f"{peaks_of['lens_kernels']} MiB | TRL {peaks_of['trl']}, Liger compiled"
            f" {peaks_of['liger']}, dense PyTorch {peaks_of['dense']} | {basis}"
        ) in text
    with (CPU / "speed_vs_peers.csv").open() as file:
        rows = list(csv.DictReader(file))
    ratios = {what: measured for what, _, measured, _, _ in bars.verdict(rows)}
    (own,) = (line[1] for line in bars.base_times(rows) if line[0].startswith("lens_kernels"))
    assert f"{own} s, {ratios['lens_kernels / four GEMMs']} x" in text
    assert (
        f"Liger compiled {ratios['Liger, compiled / lens_kernels']} x our time, lean dense PyTorch"
        f" {ratios['dense PyTorch, lean / lens_kernels']} x, TRL"
        f" {ratios['TRL / lens_kernels']} x"
    ) in text
    published = ratios["DistillLens as published / lens_kernels, 5 pairs, half masked"]
    assert f"published DistillLens loss {published} x" in text
    counted = plan(8192, 128256, 2048, 4096)
    ours, dense = (f"{counted[k].workspace_bytes / 1e9:.1f} GB" for k in ("torch", "dense"))
    assert f"| {ours} | dense PyTorch {dense} | counted" in text


def test_the_table_of_plans_is_what_plan_says():
    assert f"\n{kernel_report.plan_table()}\n" in kernel_report.PAGE.read_text()


def test_changelog_citation_and_version_agree():
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{__version__}}}" in README.read_text()


def test_contributing_lists_every_module_after_those_that_it_imports():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`lens_kernels/.*?) \|", text, re.MULTILINE)
    listed = [path for row in rows for path in re.findall(r"`([^`]+)`", row)]

    def place(path: str) -> int:
        found = [p for p in listed if path == p or (p.endswith("/") and path.startswith(p))]
        assert found, f"{path} is not listed"
        return listed.index(max(found, key=len))

    for source in ROOT.glob("lens_kernels/**/*.py"):
        if source.name in ("__init__.py", "__main__.py", "version.py"):
            continue
        here = place(name(source))
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lens_kernels"):
                modules = [node.module, *(f"{node.module}.{x.name}" for x in node.names)]
                paths = [f"{m.replace('.', '/')}.py" for m in modules]
                assert all(
                    place(p) <= here
                    for p in paths
                    if (ROOT / p).is_file() and p != "lens_kernels/version.py"
                ), (name(source), node.module)
