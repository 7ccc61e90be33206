"""Checks that need a GPU, marked ``gpu``, and the same checks on the CPU with tiny sizes.

The checks on the CPU find mistakes in the code before it runs on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lens_kernels.backends.torch import row_chunks
from tests.support import ROOT, recompilation
from tests.support import gpu_checks as check
from tests.support.gpu_checks import BACKENDS, CPU, DTYPES, GPU, HALF, LARGE, WIDE
from tests.support.grids import BATCH, DIVERGENCES, FEATURES, ODD, Shape, several_chunks

EVERY = {"backend": BACKENDS, "dtype": DTYPES, "divergence": DIVERGENCES, "feature": FEATURES}


def gpu(*over, **more):
    """Return a decorator that marks a test for a GPU, and runs it with all combinations of values.

    The values are the named lists of ``EVERY``, and further lists.
    """
    absent = not torch.cuda.is_available()
    marks = [pytest.mark.gpu, pytest.mark.skipif(absent, reason="no GPU")]
    for name, values in ({name: EVERY[name] for name in over} | more).items():
        marks.append(pytest.mark.parametrize(name, values, ids=str))

    def marked(test):
        for mark in marks:
            test = mark(test)
        return test

    return marked


@gpu()
def test_kernels_are_compiled():
    pytest.importorskip("triton")
    from lens_kernels.backends.triton.interpreter import INTERPRETING

    assert not INTERPRETING, "TRITON_INTERPRET is set: these tests would not run compiled kernels"


@gpu("dtype", "divergence", "feature", "backend")
def test_parity(backend, feature, divergence, dtype):
    chunks = {"workspace_bytes": several_chunks(BATCH, 12)}
    check.parity(GPU, backend, dtype, BATCH, feature, divergence, **chunks)


@gpu("divergence", dtype=DTYPES[:2], backend=["torch"])
def test_the_pass_by_inductor(backend, divergence, dtype, monkeypatch):
    """The op uses this pass for float64, which the row kernel does not support."""
    monkeypatch.setattr(row_chunks, "has_row_kernel", lambda *args: False)
    check.parity(GPU, backend, dtype, BATCH, "everything", divergence)


@gpu("dtype", "divergence", "backend", shape=[LARGE, WIDE])
def test_sizes_beyond_a_tile(backend, divergence, dtype, shape):
    check.large(GPU, backend, dtype, shape, divergence)
    check.large(GPU, backend, dtype, shape, divergence, mask=True)


@gpu("dtype", "backend")
def test_masks_and_labels(backend, dtype):
    check.masked_rows_are_inert(GPU, backend, dtype, BATCH)
    check.whole_objective(GPU, backend, dtype, BATCH)


@gpu("divergence", "backend")
def test_near_convergence(backend, divergence):
    check.near_convergence(GPU, backend, divergence)


@gpu("dtype", "divergence", "backend")
def test_identical_models(backend, divergence, dtype):
    check.identical(GPU, backend, dtype, divergence, ODD)
    check.identical(GPU, backend, dtype, divergence, LARGE)


@gpu("divergence", "backend", std=[10.0, 30.0])
def test_peaked_distributions(backend, divergence, std):
    check.peaked(GPU, backend, divergence, std, ODD)


@gpu("dtype", "divergence")
def test_backends_agree_at_the_size_of_a_model(divergence, dtype):
    check.agreement(GPU, dtype, divergence, Shape((512,), 50257, 768, 1600, 2))


@gpu("dtype", "backend", divergence=["jsd", "reverse_kl"])
def test_twenty_runs_are_the_same_bit_for_bit(backend, divergence, dtype):
    check.determinism(GPU, backend, dtype, divergence, replace(LARGE, pairs=2), runs=20)


@gpu("dtype")
def test_a_cuda_graph_holds_a_call_without_a_mask(dtype):
    check.captured(GPU, dtype)


@gpu(dtype=HALF)
def test_offsets_beyond_32_bit_in_the_gradient(dtype):
    tokens, vocab = 20000, 131072
    assert tokens * vocab > 1.2 * 2**31
    check.large_gradient(GPU, tokens, vocab, 64, dtype)


@gpu(dtype=HALF)
def test_offsets_beyond_32_bit_in_a_head(dtype):
    vocab, width = 262144, 10240
    assert vocab * width > 1.2 * 2**31
    check.large_head(GPU, 200, vocab, width, 64, dtype)


@gpu()
def test_nothing_is_compiled_again_for_other_sizes_and_numbers():
    assert check.compiled_again(GPU, recompilation.CALLS) > 0


@gpu("backend")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(backend):
    check.float32(torch.device("cuda", 1), backend, ODD, "everything", "jsd")


# The checks above, run on the CPU at tiny sizes


TINY = Shape((5,), 70, 24, 40, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_smoke(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    for dtype in DTYPES:
        for feature in ("plain", "everything"):
            check.parity(CPU, backend, dtype, TINY, feature, "jsd")
        check.whole_objective(CPU, backend, dtype, TINY)
    check.large(CPU, backend, torch.float32, TINY, "jsd")
    check.large(CPU, backend, torch.bfloat16, TINY, "tvd", mask=True)
    check.masked_rows_are_inert(CPU, backend, torch.float16, TINY)
    check.identical(CPU, backend, torch.bfloat16, "tvd", TINY)
    check.determinism(CPU, backend, torch.bfloat16, "jsd", TINY, runs=2)
    check.captured(CPU, torch.bfloat16)


def test_smoke_of_the_checks_that_compare_backends():
    pytest.importorskip("triton")
    check.agreement(CPU, torch.float32, "jsd", TINY)
    check.agreement(CPU, torch.bfloat16, "tvd", TINY)
    check.large_gradient(CPU, 20, 130, 16, torch.bfloat16)
    check.large_head(CPU, 20, 130, 32, 16, torch.bfloat16)
    assert len(check.kernels()) == 6
    few = {**recompilation.FIRST, "tokens": 3, "vocab": 20}
    # No kernel is compiled, because the interpreter runs here.
    assert check.compiled_again(CPU, [few, few]) == 0


def test_no_call_but_the_first_has_a_new_key():
    """Only the first of several calls compiles kernels: later calls have the same keys in Triton.

    ``recompilation.py`` computes these keys without a GPU.
    """
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.recompilation"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[: len(recompilation.CALLS)]
    numbers = {line.split()[0] for line in lines}
    assert len(numbers) == 1 and int(numbers.pop()) > 0, result.stdout
