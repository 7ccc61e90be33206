"""The command line describes the machine and rejects invalid arguments."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lens_kernels import __version__, cli


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
