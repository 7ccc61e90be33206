"""Measures peak memory, and fills uninitialised memory with a value."""

import gc

import torch

from benchmarks.support.memory import measure
from lens_kernels.backends.torch import row_chunks
from tests.support.problems import capture_call

MIB = 2**20


def peak_bytes(function):
    """Return by how many bytes ``function`` increases memory on the CPU at its peak."""
    function()  # the first run fills caches, which must not be counted
    gc.collect()
    return measure(function, torch.device("cpu")).peak


def peak_of(monkeypatch, problem, **options):
    """Return the peak memory in bytes of a call on the torch backend."""
    call = capture_call(monkeypatch, problem, **options)
    return peak_bytes(torch.no_grad()(lambda: row_chunks.evaluate(call)))


def fill_new_tensors(monkeypatch, value):
    def filled(function):
        def wrapper(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(value) if x.is_floating_point() else x

        return wrapper

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
