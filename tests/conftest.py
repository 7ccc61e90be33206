"""Settings for all tests: Triton interprets kernels, and every test starts from a fixed seed."""

import os
import sys

import pytest
import torch

from lens_kernels import dispatch
from tests.support.cluster_kernel_backend import CLUSTER_KERNEL
from tests.support.reference_backend import REFERENCE
from tests.support.row_kernel_backend import ROW_KERNEL

# Use one thread. The tests' matrices are small, so a second thread saves little. On a busy machine,
# waiting for a second thread costs up to a second in each test.
torch.set_num_threads(1)
for backend in (REFERENCE, ROW_KERNEL, CLUSTER_KERNEL):
    dispatch.REGISTRY[backend.name] = backend


# Triton reads this setting when it is imported, and the conftest of a folder may import it.
GIVEN = os.environ.get("TRITON_INTERPRET", "0")
os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    """Let Triton interpret all kernels, unless ``-m gpu`` selects tests that compile them."""
    if config.option.markexpr == "gpu":
        os.environ["TRITON_INTERPRET"] = GIVEN
        if "triton" in sys.modules:
            raise pytest.UsageError("a conftest loads Triton, which would interpret the kernels")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260213)


@pytest.fixture
def always_active(monkeypatch):
    """Use active-vocabulary GEMMs even if most vocabulary entries are active.

    By default they need mostly inactive entries, which the small test problems do not have.
    """
    monkeypatch.setattr("lens_kernels.backends.head_products.MAX_ACTIVE_SHARE", 1.0)
