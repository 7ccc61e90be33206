"""The backend ``cluster_kernel``: the ``torch`` backend with a row kernel whose rows span a cluster
of programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from lens_kernels.backends.torch import clusters
from lens_kernels.call import LossCall, LossResult
from tests.support import row_kernel_backend

LANES = 4  # the lanes of each program are so few that small rows take several programs


@contextmanager
def small_clusters(lanes: int = LANES) -> Iterator[None]:
    """Allow clusters of programs on every device, with ``lanes`` entries in each program.

    Triton's interpreter runs a whole cluster as one program.
    """
    with mock.patch.multiple(clusters, LANES=lanes, are_supported=lambda device: True):
        yield


def evaluate(call: LossCall) -> LossResult:
    with small_clusters():
        return row_kernel_backend.evaluate(call)


CLUSTER_KERNEL = replace(row_kernel_backend.ROW_KERNEL, name="cluster_kernel", module=__name__)
