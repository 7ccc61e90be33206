"""A made-up GPU model for the tests of tuned tiles."""

import pytest


@pytest.fixture
def some_gpu(monkeypatch):
    """Give CPU tensors the GPU model ``Some GPU``, which has no tuned tiles."""
    from lens_kernels.backends.triton.tiles import store

    monkeypatch.setattr(store, "device_name", lambda device: "Some GPU")
    store.tiles.cache_clear()
    yield "Some GPU"
    store.tiles.cache_clear()
