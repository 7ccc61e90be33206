"""Measures peak memory, and fills uninitialised memory with a value."""

import gc

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def peak_bytes(function):
    """Return by how many bytes ``function`` increases memory at its peak.

    The profiler sees every allocation of torch's CPU allocator, also inside operators.
    """
    # The first run fills caches, which must not be counted.
    function()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    sizes = [e for e in events if e.name() == "[memory]"]
    for event in sorted(sizes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def fill_new_tensors(monkeypatch, value):
    def filled(function):
        def wrapper(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(value) if x.is_floating_point() else x

        return wrapper

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
