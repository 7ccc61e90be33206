"""The row kernel for clusters of programs: where it runs, and some of its results.

The slow tests of ``test_row_pass.py`` and of the functional grids run this kernel on all cases.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton

from lens_kernels import plan
from lens_kernels.backends.torch import clusters, row_kernel_pass
from lens_kernels.backends.torch.clusters import Cluster
from lens_kernels.backends.torch.passes import Terms
from lens_kernels.backends.triton import interpreter
from lens_kernels.cost import CallShape
from tests.backends.triton import test_row_pass
from tests.backends.triton.test_row_pass import kinds, run, truth
from tests.support.cluster_kernel_backend import small_clusters
from tests.support.compare import GRADIENT, LOSS, assert_close
from tests.support.grids import FEATURES, Shape
from tests.support.problems import capture_call, make, oracle, ours


@pytest.fixture
def small():
    """Use clusters of programs with 2 lanes, so that 211 entries take 4 programs and 4 blocks."""
    interpreter.prepare()
    with small_clusters(2):
        assert clusters.that_holds(211) == Cluster(4, 4)
        yield


@kinds
def test_losses_and_gradients(small, divergence, beta):
    """Losses and gradients match float64, for divergences and for the cross entropy."""
    zs, zt = 3 * torch.randn(2, 211), 3 * torch.randn(2, 211)
    options = {"labels": torch.tensor([210, 70]), "temperature": 1.7}
    losses, grad, _ = run(zs, zt, divergence, beta, **options)
    expected, expected_grad = truth(zs, zt, divergence, beta, **options)
    for got, wanted in zip(losses, expected, strict=True):
        assert_close(got, wanted, LOSS)
    assert_close(grad, expected_grad, GRADIENT)


def test_the_statistics_describe_the_written_gradient(small):
    test_row_pass.test_the_statistics_describe_the_written_gradient()


@pytest.mark.parametrize("divergence", ["jsd", "tvd"])
def test_unusual_rows(small, divergence):
    """A row whose logits are all -inf has a uniform softmax. A NaN affects only its own row."""
    test_row_pass.test_rows_without_a_finite_logit_are_uniform(divergence, 0.5, 300.0)
    test_row_pass.test_a_row_that_is_not_a_number_stays_alone(divergence, 0.5, 1, float("nan"))


def test_a_call_with_every_feature_matches_the_oracle():
    shape = Shape((5,), 211, 8, 9, 2)
    problem = make(shape, **FEATURES["everything"])
    options = {"layer_weights": [0.2, 1.5], "mask": torch.tensor([1, 1, 0, 1, 1])}
    expected, expected_grads = oracle(problem, **options)
    loss, grads = ours(problem, backend="cluster_kernel", **options)
    assert_close(loss, expected, LOSS)
    for name, grad in expected_grads.items():
        assert_close(grads[name], grad, GRADIENT, name)


@pytest.mark.parametrize(("given", "with_grad"), [(False, True), (True, False)])
def test_the_plan_counts_the_bytes_that_the_kernel_moves(small, monkeypatch, given, with_grad):
    counted = test_row_pass.test_the_plan_counts_the_bytes_that_the_kernel_moves
    counted(monkeypatch, "cluster", "jsd", 0.5, with_grad, given)


def test_the_smallest_cluster_that_holds_a_row():
    sizes = {1: (1, 1), 32000: (4, 4), 50257: (8, 4), 128256: (16, 4), 151936: (16, 5)}
    for vocab, expected in sizes.items():
        assert clusters.that_holds(vocab)[:2] == expected
    assert clusters.that_holds(clusters.MOST)[:2] == (16, 5)
    assert clusters.that_holds(clusters.MOST + 1) is None


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that a GPU has this compute capability and number of multiprocessors."""

    def report(major, processors=132, version="3.9.0", hip=None):
        found = SimpleNamespace(major=major, multi_processor_count=processors)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(triton, "__version__", version)
        return clusters.for_rows(torch.device("cuda"), 128256)

    return report


def test_the_gpus_that_hold_rows(gpu):
    assert gpu(9) == Cluster(16, 4, 128) and gpu(9, version="3.10.1")
    assert gpu(10) == Cluster(16, 4, None)
    assert not gpu(8) and not gpu(12) and not gpu(9, hip="6.4")
    assert not gpu(9, version="3.8.0") and not gpu(9, processors=78)
    assert clusters.for_rows(torch.device("cpu"), 128256) is None


def test_only_the_registers_of_a_plain_pass_are_limited(monkeypatch):
    options = Cluster(16, 4).options
    assert options(True) == options(False) | {"maxnreg": 128}
    assert "maxnreg" not in options(False)
    assert options(False)["num_ctas"] == 16 and options(False)["LANES"] == 16 * 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_registers_are_not_limited_with_float32_gradients(small, monkeypatch, dtype):
    """With them, the compiler would spill registers on sm_90."""
    kernel = mock.MagicMock()
    monkeypatch.setattr(row_kernel_pass, "cluster_pass_kernel", kernel)
    call = capture_call(monkeypatch, make(Shape((2,), 61, 4, 4, 1), divergence="tvd"))
    tiles, weight = [torch.zeros(2, 80)[:, :61]] * 2, torch.ones(2)
    terms = Terms(call.divergences[0], weight, None, None)
    made = row_kernel_pass.RowKernelPass(call, dtype, 2)
    made.run(tiles, terms, torch.zeros(2, 64, dtype=dtype), None)
    ((_, options),) = kernel.__getitem__.return_value.call_args_list
    assert ("maxnreg" in options) == (dtype is torch.bfloat16)


def test_statistics_with_a_softcap_read_rows_again(small, monkeypatch):
    for softcap, threshold in [(None, 1e-6), (3.0, None), (3.0, 1e-6)]:
        problem = make(Shape((2,), 61, 4, 4, 1), softcap=softcap)
        call = capture_call(monkeypatch, problem, grad_threshold=threshold)
        one_read = softcap is None or threshold is None
        assert (clusters.for_call(call) is not None) == one_read
        assert CallShape.of(call).one_read == one_read


def test_a_plan_counts_one_read_only_where_a_cluster_holds_a_row(gpu):
    def moved(**options):
        made = plan(8192, 128256, 2048, 4096, **options)["torch"]
        (step,) = [step for step in made.steps if step.name == "pointwise pass"]
        return step.bytes_moved / 8192 / 128256

    assert (moved(), moved(one_read=True), moved(one_read=False)) == (26, 10, 26)
    gpu(9)
    assert (moved(), moved(one_read=False)) == (10, 26)
    with pytest.raises(ValueError, match=r"one_read .*vocab_size of 163841.*at most 163840 logits"):
        plan(8, 163841, 8, 8, one_read=True)
