"""The programs of ``make test-gpu`` and ``make bench-gpu``, tested without a GPU."""

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
def test_gpu_reports_stop_at_once_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pytest, "main", None)
    monkeypatch.setattr(speed_gpu, "gather", None)
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    assert "this needs a GPU, but torch" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="this needs a GPU, but torch"):
        speed_gpu.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


PROBE = """
import pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_bad(): assert 1 == 2, "one"
def test_absent(): pytest.skip("needs 9 GiB")
@pytest.fixture
def broken(): raise OSError("two")
def test_broken(broken): pass
@pytest.fixture
def late(): yield; raise OSError("three")
def test_late(late): pytest.skip("early")
"""


def test_the_report_has_a_line_for_every_test(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_probe.py").write_text(PROBE)
    (tmp_path / "tests" / "test_unmarked.py").write_text("def test_unmarked(): pass")
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
    assert [[row["test"].split("::")[1], row["outcome"], row["note"]] for row in rows] == [
        ["test_good", "passed", ""],
        ["test_bad", "failed", "AssertionError: one"],
        ["test_absent", "skipped", "needs 9 GiB"],
        ["test_broken", "failed", "OSError: two"],
        ["test_late", "failed", "OSError: three"],
    ]
    for row in rows:
        assert float(row["seconds"]) >= 0 and set(VERSIONS) <= row.keys()
        assert row["device"] == "Some GPU (80 GB)" and row["torch"] == torch.__version__


def test_speed_gpu_runs_end_to_end(tmp_path, clock, monkeypatch):
    checked = []
    monkeypatch.setattr(contenders, "check", lambda each, device: checked.append(each.key))
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--dtypes", "bfloat16"]
    speed_gpu.main([*options, "--contenders", "triton", "torch", "dense"])
    rows = tables.read_csv(*tmp_path.iterdir())
    assert checked == ["triton", "torch", "dense"]
    assert [(row["dtype"], row["mode"], row["contender"]) for row in rows] == [
        ("bfloat16", mode, key)
        for mode in ("forward+backward", "forward")
        for key in ("floor", "triton", "torch", "dense")
    ]
    # Each call takes 1 s longer than the last: 4 warm-up calls, then two rotated rounds of 4.
    columns = ("min_ms", "median_ms", "max_ms", "ratio_to_floor")
    found = [" ".join(row[name] for name in columns) for row in rows]
    assert found[1:3] == ["5000.000 8500.000 12000.000 0.89", "6000.000 7500.000 9000.000 0.79"]
    assert found[5].split()[1::2] == ["20500.000", "0.95"]
    # Rows 4 to 7 run only the forward pass, without gradients.
    assert rows[3]["gradients_mib"] == "0.01" and rows[7]["gradients_mib"] == "0.00"
    for row in rows:
        assert float(row["peak_with_gradients_mib"]) >= float(row["gradients_mib"])
        assert set(VERSIONS) <= row.keys() and row["rounds"] == "2"


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("torch", torch.OutOfMemoryError("too much")),
        ("trl", ValueError("of its own\nmore")),
        ("torch", ValueError("a bug")),
    ],
)
def test_table_lists_out_of_memory_and_failing_peers(monkeypatch, capsys, key, error):
    def loss(inputs):
        raise error

    # Collecting garbage is slow while the whole test suite is loaded.
    monkeypatch.setattr(speed_gpu.gc, "collect", lambda: None)
    chosen = {name: speed_gpu.CONTENDERS[name] for name in ("torch", "trl")}
    chosen["trl"] = replace(chosen["trl"], load=lambda: dense)
    chosen[key] = replace(chosen[key], load=lambda: loss)
    job = Job(8, 60, 1, 16, 24)
    # An unexpected error of lens_kernels ends the run.
    if str(error) == "a bug":
        with pytest.raises(RuntimeError, match="backend 'torch'.*ValueError: a bug"):
            speed_gpu.job_rows("tiny", job, chosen, rounds=1)
        return
    rows = speed_gpu.job_rows("tiny", job, chosen, rounds=1)
    note = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert [row["note"] for row in rows if row["contender"] == key] == [note] * 2
    for row in rows:
        assert bool(row["median_ms"]) == (row["contender"] != key)
    assert len(rows) == 6 and note in capsys.readouterr().out
