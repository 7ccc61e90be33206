"""The default tiles compile for GPUs without spills, and their GEMMs use matrix units.

The tests compile in new processes, because the test process interprets kernels.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

from benchmarks import kernel_report
from benchmarks.support import environment, tables
from tests.support import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# The script compiles each kernel once with each of its tiles. The norm kernels have the same tiles
# on all architectures. The name "large" means sm_80 with a tile of 128 x 256 for 4 warps, whose
# accumulator exceeds the registers.
SCRIPT = """
import sys, torch
from benchmarks.support import offline
from lens_kernels.backends.triton.kernels.launch import Tile
from lens_kernels.options import Divergence
for name in sys.argv[1:]:
    arch, tile = ("sm_80", Tile(128, 256, 32, 4, 2)) if name == "large" else (name, None)
    launches = {}
    for width in (576, 8192):
        for divergence in (Divergence.JSD, Divergence.REVERSE_KL):
            given = arch, torch.bfloat16, (width, width), divergence, offline.FEATURES["plain"]
            for launch in offline.record(*given, tile):
                launches.setdefault((launch.kernel, launch.tile()), launch)
    assert len({kernel for kernel, _ in launches}) == 6, launches
    for (kernel, _), launch in launches.items():
        checked = not kernel.startswith("norm") or name in ("sm_80", "gfx942")
        if kernel == "row_stats_kernel" if tile else checked:
            print(name, kernel, offline.fault(offline.compile_for(arch, launch), "bfloat16"))
"""


def run(tmp_path, *command):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=3000
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    return result.stdout.strip().splitlines()


@pytest.mark.parametrize("names", ["sm_80 gfx942 large", "sm_90 sm_100"])
def test_shipped_tiles_do_not_spill_and_use_the_matrix_units(tmp_path, names):
    lines = run(tmp_path, "-c", SCRIPT, *names.split())
    shipped = [line for line in lines if not line.startswith("large ")]
    assert {line.split()[0] for line in lines} == {*names.split()} and len(shipped) >= 8
    assert [line for line in shipped if not line.endswith(" None")] == []
    assert all(" spills " in line for line in lines if line not in shipped)


@pytest.mark.slow
def test_report_finds_no_spills_in_any_variant(tmp_path):
    run(tmp_path, "benchmarks/kernel_report.py", "--out", str(tmp_path))
    rows = tables.read_csv(tmp_path / "kernel_report_bfloat16.csv")
    assert {row["arch"] for row in rows} == {*kernel_report.ARCHS}
    assert all(row["spilled_bytes"] == "0" for row in rows)


def test_no_kernel_of_the_committed_reports_spills():
    for path in (environment.DATA / "offline").glob("kernel_report_*.csv"):
        rows = tables.read_csv(path)
        assert {row["kernel"] for row in rows} >= {"row_stats", "row_sums", "gradients"}
        assert [row for row in rows if row["spilled_bytes"] != "0"] == [], path.name


def test_costs_count_the_gemms():
    model = kernel_report.Model("toy", student=2, teacher=3, vocab=10)
    rows = {row["step"]: row for row in kernel_report.cost_rows(model, tokens=10**11)}
    # For N tokens and V vocabulary entries, a GEMM takes 2 N V operations for each unit of hidden
    # size: 2 TFLOP here.
    assert rows["dense floor"]["tflop"] == 2 * (3 * 2 + 3)
    assert rows["all, jsd tvd hellinger"]["tflop"] == 2 * (3 * (2 + 3) + 2 * 2)
    assert rows["all, KL family"]["tflop"] == 2 * (2 * (2 + 3) + 2 * 2)
    assert rows["dense floor"]["of_floor"] == 1
