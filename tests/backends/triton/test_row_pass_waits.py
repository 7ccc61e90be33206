"""A call with the row kernel does not make the host wait, so that a CUDA graph can hold it."""

import pytest
import torch

from lens_kernels import symmetric_lens_loss
from lens_kernels.backends.torch import row_chunks, row_kernel_pass
from lens_kernels.backends.torch.row_kernel_pass import RowKernelPass
from tests.backends.triton.test_row_pass_memory import NoKernel
from tests.support.gpu_checks import on
from tests.support.grids import FEATURES, Shape
from tests.support.operators import Watch
from tests.support.problems import capture_call, loss_of, make
from tests.test_memory import SYNCHRONISING


@pytest.fixture
def waits(monkeypatch):
    """Return a function that runs a call and returns the operators that would wait for a GPU.

    Tensors are on the meta device, which is not the CPU and has no values. There, the operator of
    the loss only makes its results, so the backend runs separately.
    """
    monkeypatch.setattr(row_kernel_pass, "row_pass_kernel", NoKernel())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)  # unknown for meta

    def tensor(*args, **options):
        raise AssertionError("torch.tensor copies numbers from the host to the GPU, and waits")

    def run(dtype=torch.bfloat16, divergence="jsd", **options):
        problem = make(Shape((6,), 61, 8, 8, 2), **FEATURES["everything"], divergence=divergence)
        problem = on(problem.to(dtype), torch.device("meta"))
        monkeypatch.setattr(torch, "tensor", tensor)
        with Watch() as watch:
            loss = loss_of(symmetric_lens_loss, problem, backend="torch", **options)
            problem.gradients(loss.sum())
        call = capture_call(monkeypatch, problem, backend="torch", **options)
        with watch, torch.no_grad():
            row_chunks.evaluate(call, RowKernelPass)
        assert "mm" in watch.names and watch.devices == {"meta"}
        return SYNCHRONISING.intersection(watch.names)

    return run


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16, "divergence": "reverse_kl"},
        {"layer_weights": [0.3, 0.7], "denominator": 7.0},
        {"reduction": "none", "beta": 0.3, "temperature": 2.0, "teacher_temperature": 1.5},
    ],
)
def test_a_call_without_a_mask_never_waits(waits, options):
    assert not waits(**options)


def test_a_mask_and_a_threshold_wait(waits):
    """The number of unmasked tokens, or of active columns, is the size of a tensor."""
    with pytest.raises(NotImplementedError, match="nonzero"):
        waits(mask=torch.ones(6, device="meta"))
    with pytest.raises(NotImplementedError, match="nonzero"):
        waits(grad_threshold=1e-6)
