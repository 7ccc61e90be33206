"""The shipped tiles, compiled for GPUs that are not here: no spills, products by matrix units.

In processes of their own: here the kernels are interpreted.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

from benchmarks import kernel_report
from benchmarks.support import tables
from tests.support import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# Each kernel once with each of its tiles. Those of the norms depend on no architecture.
SCRIPT = """
import sys, torch
from benchmarks.support import offline
from lens_kernels.backends.triton.kernels.launch import Tile
from lens_kernels.options import Divergence
tile = None
for arch in sys.argv[1:]:
    launches = {}
    for width in (576, 8192):
        for divergence in (Divergence.JSD, Divergence.REVERSE_KL):
            given = arch, torch.bfloat16, (width, width), divergence, offline.FEATURES["plain"]
            for launch in offline.record(*given, tile):
                launches.setdefault((launch.kernel, launch.tile()), launch)
    assert len({kernel for kernel, _ in launches}) == 6, launches
    for (kernel, _), launch in launches.items():
        if not kernel.startswith("norm") or arch in ("sm_80", "gfx942"):
            print(arch, kernel, offline.fault(offline.compile_for(arch, launch), "bfloat16"))
"""


def run(tmp_path, *command):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=3000
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    return result.stdout.strip().splitlines()


@pytest.mark.parametrize("archs", ["sm_80", "sm_90", "sm_100 gfx942"])
def test_no_shipped_tile_spills_and_all_use_the_matrix_units(tmp_path, archs):
    lines = run(tmp_path, "-c", SCRIPT, *archs.split())
    assert {line.split()[0] for line in lines} == {*archs.split()} and len(lines) >= 4
    assert [line for line in lines if not line.endswith(" None")] == []


def test_a_tile_that_is_too_large_is_reported(tmp_path):
    """The test above can fail: two accumulators of 128 x 256 do not fit."""
    script = SCRIPT.replace("tile = None", "tile = Tile(128, 256, 64, 8, 3)").replace(
        'not kernel.startswith("norm")', 'kernel == "gradients_kernel"'
    )
    (line,) = run(tmp_path, "-c", script, "sm_90")
    assert line.startswith("sm_90 gradients_kernel sm_90") and " spills " in line


@pytest.mark.slow
def test_every_variant(tmp_path):
    run(tmp_path, "benchmarks/kernel_report.py", "--out", str(tmp_path))
    rows = tables.read_csv(tmp_path / "kernel_report_bfloat16.csv")
    assert {row["arch"] for row in rows} == {*kernel_report.ARCHS}
    assert all(row["spilled_bytes"] == "0" for row in rows)


def test_costs_are_those_of_the_products():
    model = kernel_report.Model("toy", student=2, teacher=3, vocab=10)
    rows = {row["step"]: row for row in kernel_report.cost_rows(model, tokens=10**11)}
    # 2 N V = 2 TFLOP for each unit of width.
    assert rows["dense floor"]["tflop"] == 2 * (3 * 2 + 3)
    assert rows["all, jsd tvd hellinger"]["tflop"] == 2 * (3 * (2 + 3) + 2 * 2)
    assert rows["all, KL family"]["tflop"] == 2 * (2 * (2 + 3) + 2 * 2)
    assert rows["dense floor"]["of_floor"] == 1
