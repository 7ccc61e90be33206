"""Settings of all tests: kernels are interpreted, and every test starts from the same seed."""

import os

import pytest
import torch

from lens_kernels import dispatch
from tests.support.reference_backend import REFERENCE
from tests.support.row_kernel_backend import ROW_KERNEL

# The tests' matrices are small. On a busy machine, waiting for a second thread costs up to a second
# in each test, which is more than the thread saves.
torch.set_num_threads(1)
for backend in (REFERENCE, ROW_KERNEL):
    dispatch.REGISTRY[backend.name] = backend


def pytest_configure(config):
    """Let Triton interpret all kernels.

    Triton reads this setting when kernels are imported. Only ``-m gpu`` compiles kernels; all other
    tests use CPU tensors, on any machine.
    """
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260213)


@pytest.fixture
def always_active(monkeypatch):
    """Skip inactive entries even if most are active, as in the small test problems."""
    monkeypatch.setattr("lens_kernels.backends.head_products.MAX_ACTIVE_SHARE", 1.0)
