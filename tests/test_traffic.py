"""The bytes that a rank sends and holds in a step, as ``plan(world=...)`` counts them."""

import pytest
import torch

from lens_kernels import plan
from lens_kernels.traffic import Collective
from tests.support import ROOT, sharded
from tests.support.grids import Shape
from tests.support.processes import Ranks

SIZES = {"tokens": 35, "vocab_size": 61, "student_width": 12, "teacher_width": 10, "pairs": 2}
WORKSPACE = 3_000  # so small that 2 to 4 ranks need several chunks


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_sharded_vocabulary_sends_what_the_plan_counts(world, device):
    """On a GPU, the row kernel has other tiles. Here it is interpreted."""
    counted = plan(
        **SIZES, dtype=torch.float32, device=device, workspace_bytes=WORKSPACE, world=world
    )["vocabulary"]
    reductions = [x for x in counted.collectives if x.kind == "all_reduce"]
    case = {"dtype": torch.float32, "shape": Shape((5, 7), 61, 12, 10, 2)}
    case |= {"backend": {"cpu": "torch", "cuda": "row_kernel"}[device]}
    ranks = Ranks(world)
    seen = ranks.run(sharded.count_collectives, world, case | {"workspace_bytes": WORKSPACE})
    ranks.close()
    for own in seen:
        sizes = [size for kind, size in own if kind == "all_reduce"]
        assert len(sizes) == sum(x.count for x in reductions) > 8
        assert sum(sizes) == sum(x.tensor_bytes for x in reductions)


def test_a_ring_sends_a_tensor_once_or_twice():
    assert Collective("", "all_gather", None, 800).sent(8) == 700
    assert Collective("", "reduce_scatter", None, 800).sent(8) == 700
    assert Collective("", "all_reduce", None, 800).sent(8) == 1400
    assert Collective("", "all_reduce", None, 800).sent(1) == 0


def llama(world, tokens=8192):
    """Return the plan of Llama-3 8B distilled from 70B, with 4 lens pairs and the final pair."""
    return plan(
        tokens, 128_256, 4096, 8192, pairs=5, world=world,
        student_parameters=8_030_000_000, teacher_parameters=70_554_000_000,
    )  # fmt: skip


def test_the_documented_table_is_that_of_the_plan():
    text = (ROOT / "docs" / "scale.md").read_text()
    for world in (8, 64, 512):
        plans = [llama(world)[name] for name in ("ddp", "fsdp2", "zero3", "vocabulary")]
        sizes = [f"{x.held_bytes / 2**30:.0f}, {x.sent_bytes / 2**30:.0f}" for x in plans]
        assert f"| {world} | {' | '.join(sizes)} |" in text


def test_what_a_rank_holds_shrinks_with_the_number_of_ranks():
    few, many = llama(8), llama(64)
    trained, frozen = 16 * 8_030_000_000, 2 * 70_554_000_000
    for name in ("fsdp2", "zero3", "vocabulary"):
        difference = few[name].held_bytes - many[name].held_bytes
        assert difference >= (trained + frozen) * 7 // 64
    assert few["ddp"].held_bytes == many["ddp"].held_bytes > trained + frozen
    heads = 2 * 128_256 * (4096 + 8192)
    assert few["fsdp2"].held_bytes - few["vocabulary"].held_bytes > heads
    assert few["zero3"].sent_bytes - few["fsdp2"].sent_bytes == 2 * 128_256 * 4096 * 7 // 8
    assert few["vocabulary"].workspace_bytes <= few["torch"].workspace_bytes


@pytest.mark.parametrize("name", ["world", "student_parameters", "teacher_parameters"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        plan(**SIZES, **{"world": 2, name: 0})
