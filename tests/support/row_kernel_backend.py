"""The backend ``row_kernel``: ``torch`` as it runs on a GPU, with interpreted row kernels."""

from __future__ import annotations

from unittest import mock

from lens_kernels.backends.torch import row_chunks
from lens_kernels.call import LossCall, LossResult
from lens_kernels.dispatch import REGISTRY, Backend

LANES = 16  # a step of the kernel reads LANES * 8 entries of a row


def evaluate(call: LossCall) -> LossResult:
    from lens_kernels.backends.torch.row_kernel_pass import RowKernelPass
    from lens_kernels.backends.torch.sharded_row_kernel_pass import ShardedRowKernelPass
    from lens_kernels.backends.triton import interpreter
    from lens_kernels.backends.triton.kernels import row_pass

    interpreter.prepare()
    # Read few entries in a step, so that a row of a test problem takes several steps.
    with mock.patch.dict(row_pass.OPTIONS, LANES=LANES):
        return row_chunks.evaluate(call, ShardedRowKernelPass if call.group else RowKernelPass)


ROW_KERNEL = Backend(
    "row_kernel",
    __name__,
    REGISTRY["torch"].cost,
    unsupported_reason=REGISTRY["triton"].unsupported_reason,
    auto_excluded_reason=lambda *args: "only if requested by name",
    takes_shards=True,
)
