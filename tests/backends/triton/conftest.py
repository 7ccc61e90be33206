"""A GPU that is only a name."""

import pytest


@pytest.fixture
def some_gpu(monkeypatch):
    """Let tensors of the CPU count as those of a GPU of this model, for which no tile is known."""
    from lens_kernels.backends.triton.tiles import store

    monkeypatch.setattr(store, "device_name", lambda device: "Some GPU")
    store.tiles.cache_clear()
    yield "Some GPU"
    store.tiles.cache_clear()
