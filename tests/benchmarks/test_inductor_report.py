"""The kernels that Inductor generates for the pass on a GPU, counted without a GPU."""

import importlib.util
import json

import pytest

from benchmarks.support import inductor_report
from tests.benchmarks.test_kernel_report import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

REDUCTION = """
signature: {'in_ptr0': '*fp32', 'in_ptr1': '*fp32', 'out_ptr0': '*fp64', 'R0_BLOCK': 'constexpr'}
    x0 = xindex
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_index = r0_offset + r0_base
        r0_1 = r0_index
        tmp0 = tl.load(in_ptr0 + (r0_1 + ks0*x0), r0_mask & xmask, other=0.0)
        tmp1 = tl.load(in_ptr1 + (r0_1), r0_mask, other=0.0)
        tl.store(out_ptr0 + (r0_1 + 151936*x0), tmp99, r0_mask & xmask)
    tl.store(in_ptr1 + (x0), tmp14, xmask)
"""
POINTWISE = """
signature: {'in_ptr0': '*fp32', 'in_ptr1': '*fp32', 'out_ptr0': '*fp32', 'XBLOCK': 'constexpr'}
    x2 = xindex
    x0 = (xindex % 151936)
    x1 = xindex // 151936
    tmp0 = tl.load(in_ptr0 + (x2), xmask)
    tmp1 = tl.load(in_ptr1 + (x1), xmask, eviction_policy='evict_last')
    tl.store(out_ptr0 + (x0 + ks0*x1), tmp43, xmask)
"""


@pytest.mark.parametrize(("source", "size"), [(REDUCTION, 4 + 8), (POINTWISE, 4 + 4)])
def test_values_of_a_row_or_of_an_entry_alone_do_not_count(source, size):
    """Biases and sums of rows stay in the cache, and only logits do not."""
    assert inductor_report.bytes_moved(source) == size


SCRIPT = """
import json, torch
from benchmarks.support import compat, inductor_report
compat.register_device_guard()
for gradient in (True, False):
    print(json.dumps(inductor_report.measure("label smoothing", None, gradient).columns()))
"""


@pytest.mark.slow
def test_inductor_generates_code_for_a_gpu_that_is_not_there(tmp_path):
    """The plan's number of bytes holds with the installed torch."""
    lines = [json.loads(line) for line in run(tmp_path, "-c", SCRIPT) if line.startswith("{")]
    assert [line["bytes_moved"] for line in lines] == [16, 8]
    assert [line["kernels"] for line in lines] == [2, 1]
    for line in lines:
        assert line["spilled_bytes"] == 0 and 0 < line["registers"] <= 128
        assert 20 < line["instructions"] < 200
