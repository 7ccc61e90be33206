"""What make test-gpu and make bench-gpu run, tried without a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import speed_gpu
from benchmarks.support import contenders, tables
from benchmarks.support.providers import dense
from benchmarks.support.shapes import Job
from tests.support import ROOT, gpu_report

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
@pytest.fixture
def late(): yield; raise OSError("three")
@pytest.mark.gpu
def test_late(late): pytest.skip("early")
def test_without_mark(): pass
"""


def test_the_report_has_a_line_for_every_test(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_probe.py").write_text(PROBE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    code = (
        "import sys, pathlib; from benchmarks.support import environment\n"
        "from tests.support import gpu_report\n"
        "environment.no_gpu = lambda: None\n"
        "environment.device_name = lambda device: 'Some GPU (80 GB)'\n"
        "gpu_report.ROOT = pathlib.Path(sys.argv[1])\n"
        "sys.exit(gpu_report.main(['--out', sys.argv[1], '--', '-p', 'no:cacheprovider']))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    rows = tables.read_csv(tmp_path / "tests-some-gpu-80-gb.csv")
    found = {row["test"].split("::")[1]: (row["outcome"], row["note"]) for row in rows}
    assert found == {
        "test_good": ("passed", ""),
        "test_bad": ("failed", "AssertionError: one"),
        "test_absent": ("skipped", "needs 9 GiB"),
        "test_broken": ("failed", "OSError: two"),
        "test_skipped": ("skipped", "no GPU"),
        "test_late": ("failed", "OSError: three"),
    }
    for row in rows:
        assert float(row["seconds"]) >= 0 and set(VERSIONS) <= row.keys()
        assert row["device"] == "Some GPU (80 GB)" and row["torch"] == torch.__version__


def tiny(out, *contenders):
    options = ["--device", "cpu", "--tiny", "--out", str(out), "--dtypes", "bfloat16"]
    speed_gpu.main([*options, "--contenders", *contenders])
    (path,) = out.iterdir()
    return tables.read_csv(path)


def test_the_benchmark_runs_from_end_to_end(tmp_path, clock, monkeypatch):
    pytest.importorskip("triton")
    checked = []
    monkeypatch.setattr(contenders, "check", lambda each, device: checked.append(each.key))
    rows = tiny(tmp_path, "triton", "torch", "dense")
    assert checked == ["triton", "torch", "dense"]
    assert [(row["dtype"], row["mode"], row["contender"]) for row in rows] == [
        ("bfloat16", mode, key)
        for mode in ("forward+backward", "forward")
        for key in ("floor", "triton", "torch", "dense")
    ]
    # The clock adds a second with each call: 4 to warm up, then two rounds of 4, each rotated.
    assert [(row["median_ms"], row["ratio_to_floor"]) for row in rows[:4]] == [
        ("9500.000", "1.00"),
        ("8500.000", "0.89"),
        ("7500.000", "0.79"),
        ("8500.000", "0.89"),
    ]
    assert (rows[1]["min_ms"], rows[1]["max_ms"]) == ("5000.000", "12000.000")
    assert (rows[5]["median_ms"], rows[5]["ratio_to_floor"]) == ("20500.000", "0.95")
    assert rows[3]["gradients_mib"] == "0.01" and rows[7]["gradients_mib"] == "0.00"  # no backward
    for row in rows:
        assert float(row["peak_with_gradients_mib"]) >= float(row["gradients_mib"])
        assert set(VERSIONS) <= row.keys() and row["rounds"] == "2"


@pytest.fixture
def fail(monkeypatch):
    """Let a contender of the benchmark fail."""

    def run(key, error):
        def loss(inputs):
            raise error

        failing = replace(speed_gpu.CONTENDERS[key], load=lambda: loss)
        peer = replace(speed_gpu.CONTENDERS["trl"], load=lambda: dense)
        chosen = {"torch": speed_gpu.CONTENDERS["torch"], "trl": peer, key: failing}
        return speed_gpu.job_rows("tiny", Job(8, 60, 1, 16, 24), chosen, rounds=1)

    monkeypatch.setattr(speed_gpu.gc, "collect", lambda: None)  # slow beside a whole test-suite
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
    assert note in capsys.readouterr().out


def test_a_backend_that_fails_ends_the_benchmark(fail):
    with pytest.raises(RuntimeError, match="backend 'torch'.*ValueError: a bug"):
        fail("torch", ValueError("a bug"))


def test_a_peer_that_computes_something_else_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_gpu, "job_rows", lambda *args: [])
    wrong = replace(
        speed_gpu.CONTENDERS["trl"], package="torch", load=lambda: lambda inputs: dense(inputs) * 2
    )
    monkeypatch.setitem(speed_gpu.CONTENDERS, "trl", wrong)
    (row,) = tiny(tmp_path, "dense", "trl")
    assert row["contender"] == "trl" and "computes something else" in row["note"]
    monkeypatch.setitem(speed_gpu.CONTENDERS, "torch", replace(wrong, package=""))
    with pytest.raises(RuntimeError, match="computes something else"):
        tiny(tmp_path, "torch")
