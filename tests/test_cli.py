"""The command line describes the machine, and reports invalid arguments and errors."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lens_kernels import __version__, cli, failures, machine
from lens_kernels.arguments import early
from lens_kernels.lens import LensNorm
from lens_kernels.options import check_number
from tests.support.documents import PROJECT


def test_env_lists_versions_devices_and_backends(capsys):
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert f"lens_kernels {__version__}" in shown
    assert torch.__version__.split("+")[0] in shown
    assert "backend='auto' uses 'torch'" in shown
    assert "only if requested by name" in shown


def test_env_lists_missing_packages(capsys, monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    cli.main(["env"])
    assert "no-such-package not installed" in capsys.readouterr().out


def test_python_m_runs_the_command():
    command = [sys.executable, "-m", "lens_kernels", "env"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"lens_kernels {__version__}")


@pytest.mark.parametrize("words", [[], ["tune"], ["unknown"], ["env", "--nothing"]])
def test_bad_arguments_end_with_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("lens-kernels") and " --help\n" in shown and shown.count("\n") == 1


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"lens-kernels {__version__}\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--vocab", "0"], "vocab must be at least 1, got 0"), (["--dtype", "int8"], "dtype must be")],
)
def test_tune_refuses_bad_sizes(more, message, capsys):
    sizes = ["--student_width", "8", "--teacher_width", "8", "--vocab", "8"]
    assert cli.main(["tune", *sizes, *more]) == 1
    assert message in capsys.readouterr().err


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [
        KeyError("labels"),
        RuntimeError("shapes\nand many lines more"),
        AssertionError(),
        RecursionError("deep"),
        OSError(28, "No space left on device"),
    ],
)
def test_an_error_of_any_kind_is_a_message_that_names_its_traceback(error, capsys):
    assert failures.guarded("eval", raising(error)) == 1
    shown = capsys.readouterr().err
    assert (
        shown.startswith(f"lens-kernels eval: {type(error).__name__}") and "Traceback" not in shown
    )
    assert shown.count("\n") == 1
    file = Path(shown.rpartition("(traceback: ")[2].rstrip(")\n"))
    kept = file.read_text()
    assert "in run\n" in kept and str(error) in kept
    file.unlink()


def test_a_fault_of_this_package_keeps_its_traceback(capsys):
    norm = LensNorm("rms", torch.ones(2), eps=0.0)
    for fault in (lambda: check_number("width", 1.0, None), lambda: norm.forward(None)):
        assert failures.guarded("eval", fault) == 1
        shown = capsys.readouterr().err
        assert "Error: " in shown and "(traceback: " in shown
        Path(shown.rpartition("(traceback: ")[2].rstrip(")\n")).unlink()


def test_an_error_of_this_package_is_its_message(capsys):
    assert failures.guarded("eval", lambda: check_number("width", "a", 0.0)) == 1
    shown = capsys.readouterr().err
    assert "width" in shown and "traceback" not in shown
    assert failures.guarded("eval", raising(FileNotFoundError(2, "No such file", "a.json"))) == 1
    assert capsys.readouterr().err.endswith("No such file: 'a.json'\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_full_memory_says_what_to_do(error, capsys):
    for command, hint in failures.LESS.items():
        assert failures.guarded(command, raising(error)) == 1
        assert f"Memory is full: {hint}" in capsys.readouterr().err
    assert failures.guarded("tune", raising(error)) == 1
    assert "Memory is full: use smaller batches" in capsys.readouterr().err


def test_what_a_file_holds_cannot_change_the_terminal(capsys):
    odd = "a\x1b[2Jb\u202ec\udcff"
    assert failures.guarded("eval", raising(OSError(odd))) == 1
    shown = "a\\u001b[2Jb\\u202ec\\udcff"
    assert capsys.readouterr().err.startswith(f"lens-kernels eval: OSError: {shown} (")
    cli._say(odd)
    assert capsys.readouterr().out == f"{shown}\n"


def test_an_interrupt_ends_with_its_status(capsys):
    assert failures.guarded("eval", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "lens-kernels eval: interrupted\n"


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("peft.tuners", "pip install 'lens-kernels[train]'"),
        ("rouge_score", "pip install 'lens-kernels[train]'"),
        ("gguf", "pip install 'lens-kernels[demo]'"),
        ("transformers", "pip install 'lens-kernels[hf]'"),
        ("sentencepiece", "pip install sentencepiece"),
    ],
)
def test_a_missing_package_is_installed_by_an_extra_that_holds_it(module, command, capsys):
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert failures.guarded("eval", raising(error)) == 1
    assert capsys.readouterr().err.endswith(f"is not installed: {command}\n")


def test_every_package_of_an_extra_is_installed_by_an_extra_that_holds_it():
    extras = PROJECT["optional-dependencies"]
    names = {
        extra: [re.match(r"[\w.-]+", entry)[0] for entry in entries]
        for extra, entries in extras.items()
    }
    packages = {x for extra in extras if extra != "dev" for x in names[extra]} - {"lens-kernels"}
    assert {"transformers", "peft", "matplotlib", "gguf", "trl"} < packages
    for package in packages:
        found = re.fullmatch(r"pip install 'lens-kernels\[(\w+)\]'", failures.install(package))
        assert found and package in names[found[1]], package
    # The other packages of the extra "dev" are not needed.
    assert failures.install("pytest") == "pip install pytest"


def test_what_comes_with_transformers_is_installed_with_it(monkeypatch):
    assert failures.install("yaml") == "pip install pyyaml"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for module in ("yaml", "tqdm.auto", "huggingface_hub"):
        assert failures.install(module) == "pip install 'lens-kernels[hf]'"
    assert failures.install("sentencepiece") == "pip install sentencepiece"


def test_only_one_place_names_extras():
    package = Path(failures.__file__).parent
    named = [x for x in package.rglob("*.py") if "lens-kernels[" in x.read_text("utf-8")]
    assert named == [package / "failures.py"]


def unnamed_encodings(tree):
    """Return the calls that open a text file without naming its encoding."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        values = [*node.args, *(x.value for x in node.keywords)]
        given = [x.value for x in values if isinstance(x, ast.Constant)]
        named = {"utf-8", "utf-8-sig"} & {*map(str, given)} or any(
            str(x) in ("rb", "wb", "rb+", "x") for x in given
        )
        opens = ("open", "read_text", "write_text", "NamedTemporaryFile") if method else ("open",)
        if name in opens and not named:
            found.append(ast.unparse(node))
    return found


def test_every_text_file_of_the_package_is_utf_8():
    code = "open('a'), open('a', 'rb'), p.read_text(), p.write_text(x, encoding='utf-8')"
    assert len(unnamed_encodings(ast.parse(code))) == 2
    wrong = []
    for file in Path(failures.__file__).parent.rglob("*.py"):
        wrong += unnamed_encodings(ast.parse(file.read_text("utf-8")))
    # These calls need no encoding: ``cls.open`` opens a cache, gzip reads bytes, and the lock file
    # is empty.
    others = ["cls.open(folder, key)", "gzip.open(path)", "path().with_suffix('.lock').open('w')"]
    assert sorted(wrong) == others


@pytest.mark.parametrize(
    ("argv", "config", "allowed"),
    [
        ([], None, False),
        (["--allow-download"], None, True),
        (["--allow_download", "false"], None, False),
        (["--no-allow-download"], None, False),
        (["--allow-download", "--no-allow-download"], None, False),
        (["--no-allow-download", "--allow-download"], None, True),
        ([], "student: a", False),
        ([], "allow_download: yes", True),
        (["--allow_download", "no"], "allow_download: true", False),
    ],
)
def test_downloads_are_off_unless_the_options_allow_them(tmp_path, argv, config, allowed):
    if config is not None:
        (tmp_path / "config").write_text(config)
        argv = [*argv, "--config", str(tmp_path / "config")]
    assert early("lens-kernels", argv).allow_download is allowed


def test_the_commands_set_offline_mode_and_a_private_cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TORCHINDUCTOR_CACHE_DIR", "TOKENIZERS_PARALLELISM"):
        # After ``setenv``, monkeypatch restores the variable when the test ends.
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli._prepare(download=True)
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TORCHINDUCTOR_CACHE_DIR"] == "0"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    cli._prepare(download=False)
    folder = tmp_path / "lens_kernels" / "inductor"
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
