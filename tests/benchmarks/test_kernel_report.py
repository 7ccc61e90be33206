"""The shipped tiles, compiled for GPUs that are not here: no spills, products by matrix units.

In processes of their own: here the kernels are interpreted.
"""

import csv
import importlib.util
import os
import subprocess
import sys

import pytest

from benchmarks import kernel_report

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

SCRIPT = """
import sys, torch
from benchmarks import offline
from lens_kernels.options import Divergence
arch = sys.argv[1]
seen = set()
for width in (576, 8192):
    for divergence in (Divergence.JSD, Divergence.REVERSE_KL):
        features = offline.FEATURES["plain"]
        seen |= set(offline.record(arch, torch.bfloat16, (width, width), divergence, features))
kernels = {launch.kernel for launch in seen}
assert len(kernels) == 6, kernels
faults = [offline.fault(offline.compile_for(arch, launch), "bfloat16") for launch in seen]
print(len(seen), [fault for fault in faults if fault])
"""


def run(tmp_path, *command):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(kernel_report.harness.ROOT)}
    return subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=3000
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_shipped_tile_spills_and_all_use_the_matrix_units(tmp_path, arch):
    result = run(tmp_path, "-c", SCRIPT, arch)
    assert result.returncode == 0, result.stderr[-2000:]
    count, faults = result.stdout.strip().splitlines()[-1].split(" ", 1)
    assert int(count) >= 8 and faults == "[]", faults


def test_a_tile_that_is_too_large_is_reported(tmp_path):
    """The test above can fail: two accumulators of 128 x 256 do not fit."""
    script = (
        SCRIPT.replace("features))", "features, tile))")
        .replace("seen = set()", "seen = set(); tile = Tile(128, 256, 64, 8, 3)")
        .replace(
            "import sys", "from lens_kernels.backends.triton.kernels.launch import Tile\nimport sys"
        )
        .replace("(576, 8192)", "(576,)")
        .replace("in seen]", "in seen if 'gradients' in str(launch.kernel)]")  # they take long
    )
    result = run(tmp_path, "-c", script, "sm_90")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "spills" in result.stdout


@pytest.mark.slow
def test_every_variant(tmp_path):
    result = run(tmp_path, "benchmarks/kernel_report.py", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    with (tmp_path / "kernel_report_bfloat16.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["arch"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}
    assert all(row["spilled_bytes"] == "0" for row in rows)


def test_costs_are_those_of_the_products():
    model = kernel_report.Model("toy", student=2, teacher=3, vocab=10)
    rows = {row["step"]: row for row in kernel_report.cost_rows(model, tokens=10**11)}
    # 2 N V = 2 TFLOP for each unit of width.
    assert rows["dense floor"]["tflop"] == 2 * (3 * 2 + 3)
    assert rows["all, jsd tvd hellinger"]["tflop"] == 2 * (3 * (2 + 3) + 2 * 2)
    assert rows["all, KL family"]["tflop"] == 2 * (2 * (2 + 3) + 2 * 2)
    assert rows["dense floor"]["of_floor"] == 1
