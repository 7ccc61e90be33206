"""What make test-gpu and make bench-gpu run, tried without a GPU."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import providers, speed_gpu
from tests.support import ROOT, gpu_report

CPU = torch.device("cpu")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


VERSIONS = ("device", "driver", "cuda", "hip", "torch", "triton", "python", "commit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_reports_say_so_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pytest, "main", None)
    monkeypatch.setattr(speed_gpu, "gather", None)
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    assert "this runs on a GPU, and torch" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="this runs on a GPU, and torch"):
        speed_gpu.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


PROBE = """
import pytest
@pytest.mark.gpu
def test_good(): pass
@pytest.mark.gpu
def test_bad(): assert 1 == 2, "one"
@pytest.mark.gpu
def test_absent(): pytest.skip("needs 9 GiB")
@pytest.fixture
def broken(): raise OSError("two")
@pytest.mark.gpu
def test_broken(broken): pass
@pytest.mark.gpu
@pytest.mark.skip(reason="no GPU")
def test_skipped(): pass
def test_without_mark(): pass
"""


def test_the_report_has_a_line_for_every_test(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_probe.py").write_text(PROBE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    code = (
        "import sys, pathlib; from benchmarks import harness; from tests import gpu_report\n"
        "harness.no_gpu = lambda: None\n"
        "harness.device_name = lambda device: 'Some GPU (80 GB)'\n"
        "harness.ROOT = pathlib.Path(sys.argv[1])\n"
        "sys.exit(gpu_report.main(['--out', sys.argv[1], '--', '-p', 'no:cacheprovider']))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    rows = read(tmp_path / "tests-some-gpu-80-gb.csv")
    found = {row["test"].split("::")[1]: (row["outcome"], row["note"]) for row in rows}
    assert found == {
        "test_good": ("passed", ""),
        "test_bad": ("failed", "AssertionError: one"),
        "test_absent": ("skipped", "needs 9 GiB"),
        "test_broken": ("failed", "OSError: two"),
        "test_skipped": ("skipped", "no GPU"),
    }
    for row in rows:
        assert float(row["seconds"]) >= 0 and set(VERSIONS) <= row.keys()
        assert row["device"] == "Some GPU (80 GB)" and row["torch"] == torch.__version__


def test_the_benchmark_runs_from_end_to_end(tmp_path):
    pytest.importorskip("triton")
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--dtypes", "bfloat16"]
    speed_gpu.main([*options, "--contenders", "triton", "torch", "dense"])
    (path,) = tmp_path.iterdir()
    rows = read(path)
    assert [(row["dtype"], row["mode"], row["contender"]) for row in rows] == [
        ("bfloat16", mode, key)
        for mode in ("forward+backward", "forward")
        for key in ("floor", "triton", "torch", "dense")
    ]
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
        assert (row["ratio_to_floor"] == "1.00") or row["contender"] != "floor"
        assert float(row["peak_with_gradients_mib"]) >= float(row["gradients_mib"])
        assert set(VERSIONS) <= row.keys()


@pytest.fixture
def fail(monkeypatch):
    """Let a contender of the benchmark fail."""

    def run(key, error):
        def loss(inputs):
            raise error

        failing = replace(speed_gpu.CONTENDERS[key], load=lambda: loss)
        monkeypatch.setitem(speed_gpu.CONTENDERS, key, failing)
        job = providers.Job(8, 60, 1, 16, 24)
        contenders = {k: speed_gpu.CONTENDERS[k] for k in ("torch", "trl")}
        return speed_gpu.job_rows("tiny", job, contenders, rounds=1)

    pytest.importorskip("trl")
    return run


@pytest.mark.parametrize(
    ("key", "error"),
    [("torch", torch.OutOfMemoryError("too much")), ("trl", ValueError("of its own\nmore"))],
)
def test_what_does_not_fit_and_peers_that_fail_stand_in_the_table(fail, capsys, key, error):
    rows = fail(key, error)
    assert len(rows) == 6
    failed = [row for row in rows if row["contender"] == key]
    note = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert [row["note"] for row in failed] == [note] * 2
    assert all(not row["median_ms"] and not row["peak_with_gradients_mib"] for row in failed)
    assert all(row["median_ms"] for row in rows if row["contender"] != key)
    assert f"{key}: {note}" in capsys.readouterr().out


def test_a_backend_that_fails_ends_the_benchmark(fail):
    with pytest.raises(RuntimeError, match="backend 'torch'.*ValueError: a bug"):
        fail("torch", ValueError("a bug"))


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch):
    wrong = replace(
        providers.CONTENDERS["trl"], package="torch", load=lambda: lambda i: providers.dense(i) * 2
    )
    monkeypatch.setitem(speed_gpu.CONTENDERS, "trl", wrong)
    present, missing = speed_gpu.gather(["dense", "trl"], CPU)
    assert [*present] == ["dense"] and "computes something else" in missing["trl"]
    monkeypatch.setitem(speed_gpu.CONTENDERS, "torch", replace(wrong, package=""))
    with pytest.raises(RuntimeError, match="computes something else"):
        speed_gpu.gather(["torch"], CPU)
