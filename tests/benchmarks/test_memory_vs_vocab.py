"""The programs ``memory_vs_vocab.py`` and ``speed_vs_floor.py``, run at small sizes."""

import os
import subprocess
import sys

import pytest

from benchmarks import memory_vs_vocab, speed_vs_floor
from benchmarks.support import tables
from benchmarks.support.providers import CONTENDERS
from benchmarks.support.shapes import Job
from tests.support import ROOT


def quick(out, *contenders, options=("--vocab", "512")):
    command = ["--quick", "--device", "cpu", "--out", str(out), *options]
    memory_vs_vocab.main([*command, "--contenders", *contenders])
    return tables.read_csv(out / "memory_vs_vocab.csv")


def test_quick_run_writes_table_and_picture(tmp_path, figures, capsys):
    rows = quick(tmp_path, "lens_kernels", "dense", options=())
    assert {(row["contender"], row["pairs"], row["vocab_entries"]) for row in rows} == {
        (contender, pairs, vocab)
        for contender in ("lens_kernels", "dense")
        for pairs in "12"
        for vocab in ("2048", "8192")
    }
    for row in rows:
        assert row["method"] == "measured"
        assert float(row["peak_with_gradients_mib"]) > float(row["gradients_mib"]) > 6
        assert float(row["fake_peak_with_gradients_mib"]) > 0
        assert all(row[column] for column in ("device", "torch", "commit", "date_utc"))
    assert (tmp_path / "memory_vs_vocab.png").stat().st_size < 200_000
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        assert [row[name] or "-" for name in memory_vs_vocab.SHOWN] in lines


def test_without_matplotlib_the_rest_still_runs(tmp_path, figures, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert quick(tmp_path, "dense")
    assert "no picture: matplotlib is not installed; pip install" in capsys.readouterr().out
    assert not (tmp_path / "memory_vs_vocab.png").exists()


@pytest.mark.parametrize(("rate", "method"), [(1e15, "measured"), (1.0, "fake")])
def test_expensive_points_use_fake_tensors(rate, method):
    job = Job(tokens=128, vocab=8192)
    (row,) = memory_vs_vocab.points([job], [CONTENDERS["dense"]], rate, gemm_seconds=1.0)
    assert row["method"] == method
    assert bool(row["note"]) == (method == "fake")


def test_speed_ratios_use_the_floor_of_the_same_dtype(tmp_path, clock):
    sizes = ["--tokens", "64", "--vocab", "2000", "--student-width", "64", "--teacher-width", "96"]
    options = ["--device", "cpu", "--rounds", "2", "--uncompiled", "--bf16"]
    speed_vs_floor.main([*sizes, *options, "--out", str(tmp_path)])
    rows = tables.read_csv(tmp_path / "speed_vs_floor.csv")
    assert [row["dtype"] for row in rows] == ["float32"] * 6 + ["bfloat16"] * 6
    # Each call takes 1 s longer than the previous call. After 6 warm-up calls, two rounds make 6
    # calls each, in rotated order.
    columns = ("min_ms", "median_ms", "max_ms", "ratio_to_floor", "best_ratio_to_floor")
    found = [" ".join(row[name] for name in columns) for row in rows]
    assert found[1] == "7000.0 12500.0 18000.0 0.86 0.58"
    assert found[6] == "30000.0 32500.0 35000.0 1.00 1.00"
    assert found[7] == "25000.0 30500.0 36000.0 0.94 0.83"


def test_scripts_run_by_their_path_and_use_their_own_checkout(tmp_path):
    for package in ("benchmarks", "lens_kernels", "reference"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('another one')")
    scripts = [x for x in (ROOT / "benchmarks").glob("*.py") if "__main__" in x.read_text()]
    assert len(scripts) == 12
    way = "\n\nif not __package__:\n    import checkout  # noqa: F401\n\nfrom "
    assert [x.name for x in scripts if way not in x.read_text()] == []
    command = [sys.executable, ROOT / "benchmarks" / "memory_vs_vocab.py", "--help"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "--gemm-seconds" in result.stdout, result.stderr
