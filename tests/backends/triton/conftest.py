"""A simulated GPU."""

import pytest


@pytest.fixture
def some_gpu(monkeypatch):
    """Report CPU tensors as those of a GPU model that has no tuned tiles."""
    from lens_kernels.backends.triton.tiles import store

    monkeypatch.setattr(store, "device_name", lambda device: "Some GPU")
    store.tiles.cache_clear()
    yield "Some GPU"
    store.tiles.cache_clear()
