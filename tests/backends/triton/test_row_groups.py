"""Groups of row blocks change how many bytes are read through a cache, but no result.

The simulated cache holds the blocks that were read last. Programs run in waves, in the order of
their launch. The programs of a wave read at the same pace.
"""

from collections import OrderedDict

import pytest
import torch
import triton
import triton.language as tl

from lens_kernels import plan
from lens_kernels.backends import row_groups
from lens_kernels.backends.triton import interpreter
from lens_kernels.backends.triton.kernels import launch
from lens_kernels.backends.triton.kernels.deviations import standardized
from lens_kernels.backends.triton.kernels.gradients import gradient_chunk
from lens_kernels.backends.triton.kernels.logits import place_of
from lens_kernels.backends.triton.kernels.online_kl import online_kl
from lens_kernels.backends.triton.kernels.operands import Operand
from lens_kernels.backends.triton.kernels.row_stats import row_stats
from lens_kernels.backends.triton.kernels.row_sums import row_sums
from lens_kernels.options import Divergence
from tests.support.grids import FEATURES, Shape
from tests.support.problems import check, make, ours


def bytes_read(programs, at_once, capacity):
    """Return the bytes that a simulated cache reads from memory.

    Each program in ``programs`` is a list of its reads, ``(block, bytes)``.
    """
    held, moved, size_held = OrderedDict(), 0, 0
    for first in range(0, len(programs), at_once):
        wave = programs[first : first + at_once]
        for step in range(max(map(len, wave))):
            for block, size in (program[step] for program in wave if step < len(program)):
                if block not in held:
                    moved += size
                    size_held += size
                held[block] = size
                held.move_to_end(block)
            while size_held > capacity:
                size_held -= held.popitem(last=False)[1]
    return moved


# Sizes that give two groups of two row blocks, and two splits of eight tiles each.
TOKENS, VOCAB, WIDTHS, TILE = 64, 256, (16, 32), launch.Tile(16, 16, 16, 4, 1)
AT_ONCE = 4  # The number of programs that run at a time: two row blocks times two splits.


@pytest.fixture
def small_groups(monkeypatch):
    interpreter.prepare()
    monkeypatch.setattr(row_groups, "GROUP_ROWS", 32)
    monkeypatch.setattr(launch, "processors", lambda device: AT_ONCE // 2)


@pytest.fixture
def read(monkeypatch, small_groups):
    """Return a function that runs ``function``, and returns each program's reads and its result.

    Only reads from ``tensors`` count.
    """
    builder = interpreter.compat.triton_interpreter().InterpreterBuilder
    load = builder.create_masked_load

    def run(function, *tensors):
        ranges = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]
        programs = {}

        def recording(self, pointers, *args):
            start = int(pointers.data.min())
            if any(first <= start < end for first, end in ranges):
                size = pointers.data.size * tensors[0].element_size()
                programs.setdefault(self.grid_idx, []).append((start, size))
            return load(self, pointers, *args)

        with monkeypatch.context() as patch:
            patch.setattr(builder, "create_masked_load", recording)
            result = function()
        return list(programs.values()), result

    return run


# The programs of a wave read 32 rows and 32 columns of 192 bytes each. These 12 KiB fit in a
# cache of 14 KiB, but not in one of 10 KiB.
@pytest.mark.parametrize("capacity", [14 << 10, 10 << 10])
def test_the_plan_counts_what_the_kernels_read_through_a_cache(monkeypatch, read, capacity):
    monkeypatch.setattr(row_groups, "CACHE_BYTES", capacity)
    student, teacher = (
        Operand(torch.randn(TOKENS, width), torch.randn(VOCAB, width), None, 1.0, None, 1.0)
        for width in WIDTHS
    )
    both = student, teacher
    out, weight = torch.empty(TOKENS, VOCAB), torch.ones(TOKENS)

    def counted(function, *operands):
        programs, result = read(function, *(x for o in operands for x in (o.x, o.weight)))
        return bytes_read(programs, AT_ONCE, capacity), result

    (first, stats_s), (second, stats_t) = (
        counted(lambda operand=operand: row_stats(operand, VOCAB, TILE), operand)
        for operand in both
    )
    # The sweep for standardised logits reads as much as that of log-sum-exps.
    assert counted(lambda: standardized(student, VOCAB, TILE), student)[0] == first
    jsd = Divergence.JSD
    sums_bytes, sums = counted(
        lambda: row_sums(*both, stats_s, stats_t, jsd, 0.5, VOCAB, TILE), *both
    )
    online_bytes, _ = counted(lambda: online_kl(*both, Divergence.JEFFREYS, VOCAB, TILE), *both)
    grad_bytes, _ = counted(
        lambda: gradient_chunk(*both, sums, weight, None, jsd, 0.5, VOCAB, 0, out, TILE), *both
    )
    planned = {
        step.name: step.bytes_moved
        for divergence in ("jsd", "jeffreys")
        for step in plan(TOKENS, VOCAB, *WIDTHS, divergence=divergence, dtype=torch.float32)[
            "triton"
        ].steps
    }
    written = out.numel() * out.element_size()
    assert first + second == planned["log-sum-exps"]
    assert sums_bytes == planned["row sums"]
    assert online_bytes == planned["log-sum-exps and row sums"]
    assert grad_bytes + written == planned["gradient of the logits"]


@triton.jit
def places_kernel(out, programs, blocks, group_blocks, SIZE: tl.constexpr):
    program = tl.arange(0, SIZE)
    block, part = place_of(program, programs, blocks, group_blocks)
    tl.store(out + program * 2, block, mask=program < programs)
    tl.store(out + program * 2 + 1, part, mask=program < programs)


def places(programs, blocks, group_blocks):
    """Return each program's row block and part of the vocabulary, as the kernels compute them."""
    out = torch.full((programs, 2), -1, dtype=torch.int32)
    size = triton.next_power_of_2(programs)
    places_kernel[(1,)](out, programs, blocks, group_blocks, SIZE=size)
    return out.tolist()


@pytest.mark.parametrize(("blocks", "group", "parts"), [(1, 1, 1), (7, 3, 5), (6, 3, 1), (5, 5, 4)])
def test_every_place_has_one_program(blocks, group, parts):
    order = places(blocks * parts, blocks, group)
    assert sorted(order) == [[block, part] for block in range(blocks) for part in range(parts)]
    assert [block // group for block, _ in order] == sorted(block // group for block, _ in order)


@pytest.mark.parametrize(("tile", "at_once"), [((128, 128), 132), ((64, 128), 264)])
@pytest.mark.parametrize(("widths", "gb"), [((2048, 4096), 9.6), ((8192, 4096), 35.8)])
def test_at_8192_tokens_few_tiles_read_the_hidden_states(monkeypatch, widths, gb, tile, at_once):
    """The planned reads match those of a simulated H100 for Llama-3's vocabulary in 16 bits.

    An H100 has 132 processors and a cache of 50 MiB. The operands of the second pair of hidden
    sizes exceed the cache. Without groups, programs would read 52 GB for the first pair and 105 GB
    for the second.
    """
    tokens, vocab, row, steps = 8192, 128256, 2 * sum(widths), 4
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    grid = launch.SplitGrid(tokens, vocab, launch.Tile(*tile, 64, 8, 3), torch.device("cpu"))
    blocks, tiles, per_split = tokens // tile[0], vocab // tile[1], grid.tiles_per_split
    x_bytes, w_bytes = (size * row // steps for size in tile)

    def moved(group):
        programs = [
            [
                read
                for at in range(part * per_split, min(part * per_split + per_split, tiles))
                for k in range(steps)
                for read in (((block, k), x_bytes), ((-1 - at, k), w_bytes))
            ]
            for block, part in places(blocks * grid.splits, blocks, group)
        ]
        return bytes_read(programs, at_once, 50 << 20)

    hidden, head = row_groups.operand_reads(tokens, vocab, row)
    expected = (hidden * tokens + head * vocab) * row
    assert expected == pytest.approx(gb * 1e9, rel=0.01)
    assert moved(grid.group_blocks) == pytest.approx(expected, rel=0.02)
    assert moved(blocks) > 2.5 * expected


@pytest.mark.parametrize("divergence", ["jsd", "jeffreys"])
def test_groups_change_no_bit(monkeypatch, small_groups, divergence):
    """Groups of any size give equal bits, because each split has one tile."""
    problem = make(Shape((150,), 200, 24, 40, 1), **FEATURES["everything"], divergence=divergence)
    monkeypatch.setattr(launch, "processors", lambda device: 100)
    results = []
    for rows, blocks in ((1024, 3), (128, 2)):
        monkeypatch.setattr(row_groups, "GROUP_ROWS", rows)
        assert row_groups.group_blocks(150, 64) == blocks
        results.append(ours(problem, backend="triton"))
    (loss, grads), (expected, expected_grads) = results
    assert torch.equal(loss, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)
    check(problem, backend="triton")
