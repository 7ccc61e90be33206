"""Memory on a CPU: large tensors use huge pages, and freed memory is reused."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lens_kernels.backends import accumulator, pages
from lens_kernels.backends import compiled as compiled_calls
from lens_kernels.backends.pages import HUGE_PAGE, in_huge_pages
from lens_kernels.backends.torch import layout, pointwise_pass, row_chunks
from tests.support.grids import Shape
from tests.support.problems import make, ours, recorded

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
linux = pytest.mark.skipif(not THP.exists(), reason="needs Linux with transparent huge pages")
glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ),
    reason="needs glibc's malloc with its own settings",
)


def asked_for_huge_pages(address):
    """Return whether huge pages are requested for the memory region that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if first == "VmFlags:":
            if inside:
                return "hg" in rest
        elif not first.endswith(":"):
            start, end = (int(x, 16) for x in first.split("-"))
            inside = start <= address < end
    raise AssertionError(f"{address:#x} is not mapped")


@linux
def test_only_whole_huge_pages_of_a_tensor_are_requested():
    # The tensor is large. Small ones may reuse memory that has huge pages because of an earlier
    # tensor.
    x = torch.empty(40 * HUGE_PAGE, dtype=torch.uint8)
    # The last byte of the page in which the tensor starts. The page also holds other memory.
    edge = x.data_ptr() - 1 - x.data_ptr() % HUGE_PAGE + HUGE_PAGE
    assert in_huge_pages(x) is x
    assert asked_for_huge_pages(x.data_ptr() + 8 * HUGE_PAGE)
    if edge >= x.data_ptr():
        assert not asked_for_huge_pages(edge)


def test_tensors_without_such_memory_are_left_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *args: asked.append(args))
    with FakeTensorMode():
        in_huge_pages(torch.empty(1 << 30))
    for x in (
        torch.empty(1 << 30, device="meta"),
        torch.empty(0),
        torch.empty(HUGE_PAGE - 1, dtype=torch.uint8),
        torch.nn.Parameter(torch.empty(HUGE_PAGE)),
    ):
        assert in_huge_pages(x) is x
    assert asked == []
    # A float32 tensor of this many elements has the size of four huge pages.
    x = in_huge_pages(torch.empty(HUGE_PAGE))
    ((start, length, _),) = asked
    assert start % HUGE_PAGE == 0 and length == (3 if x.data_ptr() % HUGE_PAGE else 4) * HUGE_PAGE


def test_systems_without_the_request(monkeypatch):
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    pages._madvise.cache_clear()
    x = torch.empty(HUGE_PAGE)
    assert in_huge_pages(x) is x
    pages._madvise.cache_clear()


def test_the_tiles_and_the_gradients_are_in_huge_pages(monkeypatch):
    tiles = recorded(monkeypatch, row_chunks, "in_huge_pages")
    gradients = recorded(monkeypatch, accumulator, "in_huge_pages")
    shape = Shape((24,), 1000, 8, 16, 1)
    ours(make(shape))
    tile = (24, layout.row_stride(shape.vocab))
    assert [x.shape for _, x in tiles] == [tile, tile]
    assert sorted(x.shape for _, x in gradients) == [(24, 8), (1000, 8)]


FAULTS = """
import resource, torch
from lens_kernels.backends.pages import keep_freed_blocks

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [torch.empty(1 << 20).zero_() for _ in range(12)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_blocks()
faults()
print(faults())
"""


@glibc
def test_freed_blocks_are_kept():
    """If all blocks were freed, these rounds would cause 60,000 page faults."""
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000


@pytest.mark.parametrize("compiled", [True, False])
def test_only_a_compiled_pass_keeps_freed_blocks(monkeypatch, compiled):
    asked = []
    monkeypatch.setattr(pointwise_pass, "is_compiled", lambda *args: compiled)
    monkeypatch.setattr(compiled_calls, "_compile", lambda function: function)
    monkeypatch.setattr(pointwise_pass, "keep_freed_blocks", lambda: asked.append(True))
    ours(make(Shape((24,), 1000, 8, 16, 1)))
    assert bool(asked) is compiled
