"""The file of tuned tiles: how it is written and read, and how a call uses its tiles."""

import functools
import importlib
import json
import multiprocessing
import time
import warnings

import pytest
import torch

triton = pytest.importorskip("triton")

from lens_kernels import LensHead, cache, symmetric_lens_loss  # noqa: E402
from lens_kernels.backends.triton import evaluate  # noqa: E402
from lens_kernels.backends.triton.kernels.launch import Tile  # noqa: E402
from lens_kernels.backends.triton.tiles import store  # noqa: E402
from lens_kernels.backends.triton.tiles.sizes import ARCHS, Sweep  # noqa: E402
from tests.support.problems import recorded  # noqa: E402

CPU = torch.device("cpu")
GPU = "Some GPU"
SM_90, GRADIENTS = ARCHS["sm_90"], Sweep.GRADIENTS
FAST, SLOW = Tile(16, 64, 32, 4, 2), Tile(32, 64, 32, 4, 3)
KEY = {"sweep": Sweep.ROW_SUMS, "dtype": torch.bfloat16, "width": 768}
RECORD = store.record_of(GPU, tuple(KEY.values()), FAST)


def save(tile=FAST, device=GPU, **changes):
    store.save(device, tuple({**KEY, **changes}.values()), tile)


@pytest.fixture
def compiled(monkeypatch, tmp_path, some_gpu):
    """Pretend that kernels are compiled for an H100, and return the path of the tile file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "INTERPRETING", False)
    monkeypatch.setattr(store, "arch_of", lambda device: SM_90)
    return tmp_path / "lens_kernels" / "tiles.json"


def look(**changes):
    return store.lookup(**{**KEY, **changes}, device=CPU)


def test_lookup_is_by_sweep_dtype_and_width(compiled):
    assert store.path() == compiled and look() is None
    save(SLOW)
    save(FAST)
    save(SLOW, sweep=GRADIENTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look() == FAST
        assert look(sweep=GRADIENTS) == SLOW
        others = [{"sweep": Sweep.ONLINE_KL}, {"dtype": torch.float16}, {"width": 1024}]
        assert all(look(**other) is None for other in others)


def test_the_file_is_read_once_and_never_by_the_interpreter(compiled, monkeypatch):
    save()
    assert look() == FAST
    monkeypatch.setattr(store, "load", None)
    assert look() == FAST and look(width=1) is None
    monkeypatch.setattr(store, "INTERPRETING", True)
    assert look() is None


def test_a_call_uses_the_tuned_tiles(compiled, monkeypatch):
    """A sweep that reads both models looks up a tile by the smaller hidden size."""
    monkeypatch.setattr(store, "lookup", lambda sweep, *key: FAST if sweep is GRADIENTS else None)
    asked = recorded(monkeypatch, store, "lookup")
    used = recorded(monkeypatch, importlib.import_module(evaluate.__module__), "gradient_chunk")
    student = torch.randn(5, 24, requires_grad=True)
    heads = torch.randn(70, 24), torch.randn(70, 40)
    symmetric_lens_loss(student, torch.randn(5, 40), *heads, backend="triton").backward()
    sweeps = [(Sweep.ROW_STATS, 24), (Sweep.ROW_STATS, 40), (Sweep.ROW_SUMS, 24), (GRADIENTS, 24)]
    assert [args[:3] for args, _ in asked] == [(s, torch.float32, width) for s, width in sweeps]
    assert [args[-1] for args, _ in used] == [FAST]


@pytest.mark.parametrize("extra", [{"bias": torch.zeros(70)}, {"softcap": 3.0}])
def test_tiles_tuned_without_bias_and_softcap_are_not_used_with_them(monkeypatch, extra):
    """A bias or softcap takes registers, so a tuned tile may not fit."""
    monkeypatch.setattr(store, "lookup", None)
    student = torch.randn(5, 24, requires_grad=True)
    heads = LensHead(torch.randn(70, 24), **extra), LensHead(torch.randn(70, 24))
    call = functools.partial(symmetric_lens_loss, student, student.detach(), backend="triton")
    with pytest.raises(TypeError, match="not callable"):
        # The lookup, which is None here, is called for the teacher's sweep: its head has no bias or
        # softcap.
        call(*heads, divergence="jsd")
    call(heads[0], heads[0], divergence="jsd").backward()


def damaged(**changes):
    return {"format": 1, "tiles": [{**RECORD, **changes}]}


TILE = RECORD["tile"]
INVALID = {
    "not json": b"{",
    "binary": b"\xff\xfe\x00",
    "other format": {"format": 0, "tiles": []},
    "a list": [],
    "no tiles": {"format": 1, "tiles": {}},
    "not a record": {"format": 1, "tiles": ["x"]},
    "unknown sweep": damaged(sweep="row_something"),
    "unknown dtype": damaged(dtype="int8"),
    "width is a text": damaged(width="768"),
    "no tile": damaged(tile=None),
    "a field too few": damaged(tile={k: v for k, v in TILE.items() if k != "warps"}),
    "a truth value": damaged(tile={**TILE, "stages": True}),
    "no power of two": damaged(tile={**TILE, "block_v": 96}),
    "too much shared memory": damaged(tile={**TILE, "block_k": 2048}),
    "too many registers": damaged(tile={**TILE, "block_n": 256, "block_v": 256, "block_k": 16}),
    "other triton": damaged(triton="1.0"),
}


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID)
def test_invalid_content_is_ignored_with_one_warning_that_names_the_file(compiled, content):
    compiled.parent.mkdir()
    readable = isinstance(content, dict) and bool(content["tiles"])
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    compiled.write_bytes(content)
    with pytest.warns(UserWarning) as caught:
        assert look() is None
        assert look() is None
    assert len(caught) == 1 and str(compiled) in str(caught[0].message)
    # Saving a new tile replaces content that is invalid.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(SLOW)
    assert ["is replaced" in str(w.message) for w in caught] == ([] if readable else [True])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert look() == SLOW


def test_other_entries_are_kept_but_not_used(compiled, monkeypatch):
    save(SLOW, device="Another GPU")
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "1.0")
        save(SLOW)
    save(FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look() == FAST
    for width in (1024, 2048):
        save(Tile(96, 64, 32, 4, 2), width=width)
    with pytest.warns(UserWarning, match="powers of two.*and 1 more"):
        assert look() == FAST
    assert look(width=1024) is None
    assert len(json.loads(compiled.read_text())["tiles"]) == 5


def test_a_failed_write_does_not_change_the_file(compiled, monkeypatch):
    save(SLOW)

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save(FAST)
    assert look() == SLOW
    assert sorted(p.name for p in compiled.parent.iterdir()) == ["tiles.json", "tiles.lock"]


def write(start):
    for width in range(start, start + 3):
        save(width=width)


def test_processes_that_write_at_once_lose_nothing(compiled, monkeypatch):
    replace = store.os.replace

    def slowly(*args):
        """Replace the file late, so that writers without a lock would read the old file."""
        time.sleep(0.02)
        replace(*args)

    monkeypatch.setattr(store.os, "replace", slowly)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(10 * i,)) for i in range(4)]
    for process in writers:
        process.start()
    while any(process.is_alive() for process in writers):
        if compiled.exists():
            # While processes write, a reader always finds a complete file.
            json.loads(compiled.read_text())
    for process in writers:
        process.join()
        assert process.exitcode == 0
    assert len(store.load(GPU, SM_90)) == 12


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "lens_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "lens_kernels"
