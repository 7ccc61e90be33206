"""The bytes and instructions that a pair of logits costs in the row kernels, compiled for GPUs.

The tests compile in new processes, because the test process interprets kernels.
"""

import importlib.util
import json

import pytest

from benchmarks.support import row_report
from tests.benchmarks.test_kernel_report import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

SCRIPT = """
import json, sys, torch
from benchmarks.support import row_report
from lens_kernels.options import Divergence
for job in sys.argv[1:]:
    arch, divergence, variant, *held = job.split(",")
    case = torch.bfloat16, Divergence(divergence), variant, 0.5, bool(held)
    kernel = row_report.measure(arch, *case)
    widths = sorted({width for loop in kernel.loops for width in loop.widths})
    print(json.dumps([kernel.spilled_bytes, len(kernel.loops), kernel.total("bytes_moved"),
                      kernel.total("instructions"), kernel.registers, widths,
                      kernel.warps_per_processor]))
"""
# For each kernel: its sweeps over a row, its bytes for a pair of logits, and upper limits of its
# instructions and registers. Each sweep reads 8 bytes, and the last sweep also writes a gradient of
# 2 bytes. With given log-sum-exps of the teacher, the first sweep reads 4 bytes. Instructions and
# registers depend on Triton's version. A cluster of programs reads a row once. With at most 128
# registers, two programs of 8 warps share a multiprocessor.
LIMITS = {
    "sm_90,jsd,plain": (3, 26, 105, 64),
    "sm_90,jsd,loss only": (2, 16, 80, 64),
    "sm_90,jsd,statistics": (3, 22, 105, 64),
    "sm_90,jsd,labels": (3, 26, 105, 64),
    "sm_90,reverse_kl,plain": (2, 18, 105, 64),
    "sm_80,jsd,plain": (3, 26, 110, 64),
    "sm_90,jsd,plain,held": (1, 10, 72, 128),
    "sm_90,jsd,labels,held": (1, 10, 80, 255),
}


def test_a_pair_of_logits_costs_no_more_than_counted(tmp_path):
    lines = run(tmp_path, "-c", SCRIPT, *LIMITS)
    for (job, limits), line in zip(LIMITS.items(), lines, strict=True):
        sweeps, size, instructions, registers = limits
        spilled, loops, moved, counted, used, widths, warps = json.loads(line)
        assert spilled == 0, job
        assert (loops, moved) == (sweeps, size), job
        assert widths == [16], f"{job}: loads and stores of {widths} bytes, not 16"
        assert 0.7 * instructions < counted <= instructions, job
        assert 0 < used <= registers, job
        assert warps >= (16 if registers < 255 else 8), job


def test_rows_with_sparse_targets_and_standardised_logits_compile_without_spills(tmp_path):
    (line,) = run(tmp_path, "-c", SCRIPT, "sm_90,forward_kl,targets")
    assert json.loads(line)[0] == 0


CODE = """
.L_x_0:
        /*0000*/                   LDG.E.128.CONSTANT R8, desc[UR8][R6.64] ;
        /*0010*/                   FADD R8, R8, 1 ;
        /*0020*/                   STG.E.64 desc[UR8][R4.64], R8 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/                   LDG.E R8, desc[UR8][R6.64] ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1) ;
"""


def test_loops_and_accesses_are_read_from_the_code():
    (body,) = row_report.loops(CODE)
    loop = row_report.loop_costs(body, pairs=2)
    assert (loop.instructions, loop.bytes_moved, loop.widths) == (2, 12, (16, 8))
    assert row_report.loop_costs(body, pairs=2, least=16).widths == (16,)
    assert len(row_report.instructions(CODE)) == 6
