"""Every test starts from the same random numbers, whatever ran before it."""

import os

import pytest
import torch

from lens_kernels import dispatch
from tests.support.reference_backend import REFERENCE
from tests.support.row_kernel_backend import ROW_KERNEL

# The products here are small: beside other processes, waiting for a second thread takes longer
# than it saves, up to a second for each test.
torch.set_num_threads(1)
for backend in (REFERENCE, ROW_KERNEL):
    dispatch.REGISTRY[backend.name] = backend


def pytest_configure(config):
    """Run kernels in Triton's interpreter, which is chosen when they are imported.

    The tests of a GPU alone compile them; all others have tensors of the CPU, wherever they run.
    """
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260213)


@pytest.fixture
def always_active(monkeypatch):
    """Leave entries out whatever their share: problems of tests are small, and use many of them."""
    monkeypatch.setattr("lens_kernels.backends.head_products.MAX_ACTIVE_SHARE", 1.0)
