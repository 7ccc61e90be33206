"""The command line describes the machine, and reports invalid arguments and errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lens_kernels import __version__, cli, failures
from lens_kernels.options import check_number


def test_env_lists_versions_devices_and_backends(capsys):
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert f"lens_kernels {__version__}" in shown
    assert torch.__version__.split("+")[0] in shown
    assert "backend='auto' uses 'torch'" in shown
    assert "only if requested by name" in shown


def test_env_lists_missing_packages(capsys, monkeypatch):
    monkeypatch.setattr(cli, "PACKAGES", ("torch", "no-such-package"))
    cli.main(["env"])
    assert "no-such-package not installed" in capsys.readouterr().out


def test_python_m_runs_the_command():
    command = [sys.executable, "-m", "lens_kernels", "env"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"lens_kernels {__version__}")


@pytest.mark.parametrize("arguments", [[], ["demo", "--steps", "0"], ["unknown"]])
def test_bad_arguments_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: lens-kernels" in capsys.readouterr().err


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    "error", [KeyError("labels"), RuntimeError("shapes"), AssertionError(), RecursionError("deep")]
)
def test_an_error_of_any_kind_is_a_message_that_names_its_traceback(error, capsys):
    assert failures.guarded("eval", raising(error)) == 1
    shown = capsys.readouterr().err
    assert (
        shown.startswith(f"lens-kernels eval: {type(error).__name__}") and "Traceback" not in shown
    )
    file = Path(shown.rpartition("(traceback: ")[2].rstrip(")\n"))
    assert "in run\n" in file.read_text()
    file.unlink()


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
    assert failures.guarded("eval", raising(error)) == 1
    assert "Memory is full: use smaller batches" in capsys.readouterr().err


def test_what_a_file_holds_cannot_change_the_terminal(capsys):
    odd = "a\x1b[2Jb\u202ec\udcff"
    assert failures.guarded("eval", raising(OSError(f"{odd}\nmore"))) == 1
    shown = "a\\u001b[2Jb\\u202ec\\udcff"
    assert capsys.readouterr().err == f"lens-kernels eval: {shown}\nmore\n"
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
        ([], "- a list", False),
        ([], "a: [", False),
        ([], "a: " + "[" * 5000, False),
    ],
)
def test_downloads_are_off_unless_the_options_allow_them(tmp_path, argv, config, allowed):
    if config is not None:
        (tmp_path / "config").write_text(config)
        argv = [*argv, "--config", str(tmp_path / "config")]
    assert cli._allows_download(argv) is allowed


def test_the_commands_set_offline_mode_and_a_private_cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TORCHINDUCTOR_CACHE_DIR", "TOKENIZERS_PARALLELISM"):
        # This also restores the variable after the test.
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
