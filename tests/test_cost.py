"""The planned cost of a call agrees with counted operations and measured allocations."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

from lens_kernels import SparseTargets, cost, plan
from lens_kernels.backends import matmul
from lens_kernels.backends.torch import pointwise_pass, row_chunks
from lens_kernels.cost import CallShape
from lens_kernels.options import RELATIVE_ENTROPIES, Divergence
from tests.support import ROOT
from tests.support.grids import Shape
from tests.support.memory import MIB, peak_of
from tests.support.operators import Products
from tests.support.problems import call_shape, capture_call, make

SHAPE = Shape((1536,), 4096, 48, 64, 2)
SIZES = (1536, 4096, 48, 64)
CUDA = torch.device("cuda")


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("workspace", [4 * MIB, 4096 * MIB])
def test_planned_operations_and_operands_match_the_counts(monkeypatch, workspace, wanted):
    made = make(SHAPE)
    grads = dict(zip(("head_grad", "hidden_grad"), wanted, strict=True))
    made.student_head.weight.requires_grad_(grads["head_grad"])
    for h in made.student_hidden:
        h.requires_grad_(grads["hidden_grad"])
    captured = capture_call(monkeypatch, made, workspace_bytes=workspace)
    # The vocabulary fits in one tile here, so the hidden states are read only once.
    monkeypatch.setattr(matmul, "CPU_VOCAB_TILE", 4096)
    with torch.no_grad(), Products() as products:
        row_chunks.evaluate(captured)
    options = {"dtype": torch.float32, "device": "cpu", "workspace_bytes": workspace, **grads}
    planned = plan(*SIZES, pairs=2, **options)["torch"]
    assert products.flops == planned.flops
    multiplied = [step.bytes_moved for step in planned.steps if step.flops]
    assert products.bytes == sum(multiplied) and len(multiplied) == 1 + sum(wanted)


def test_chunks_of_the_vocabulary_cost_more_memory_traffic():
    """More chunks read more memory.

    The smallest chunk has 128 entries: 2 MiB for 8192 tokens in 16 bits.
    """
    sizes = (8192, 128 * 250, 64, 32)
    whole, parts = (plan(*sizes, workspace_bytes=n)["triton"] for n in (10**9, 4 * MIB + 1))
    assert whole.workspace_bytes == 8192 * 128 * 250 * 2
    assert parts.workspace_bytes == 4 * MIB
    assert plan(*sizes, workspace_bytes=1)["triton"].workspace_bytes == 2 * MIB
    # For each of the 124 extra chunks, sweep 3 rereads both operands, the hidden gradient, and the
    # operand of the head's GEMM.
    more = 124 * 8192 * ((64 + 32) * 2 + 2 * 64 * 4 + 64 * 2)
    assert parts.bytes_moved - whole.bytes_moved == more
    no_gradient = plan(*sizes, head_grad=False, hidden_grad=False)["triton"]
    assert no_gradient.workspace_bytes == 0
    assert [step.name for step in no_gradient.steps] == ["log-sum-exps", "row sums"]


def test_float32_operands_take_longer():
    """On a GPU, GEMMs of float32 operands are ten times as expensive as GEMMs of 16-bit operands.

    Devices without 16-bit GEMMs copy 16-bit operands to float32, and run float32 GEMMs.
    """
    narrow, wide = (plan(*SIZES, dtype=d)["torch"] for d in (torch.bfloat16, torch.float32))
    emulated = plan(*SIZES, device="mps")["torch"]
    costs = [p.steps[0].cost for p in (narrow, wide, emulated)]
    assert costs[0] < costs[2] == pytest.approx(costs[1], rel=0.01)
    assert emulated.steps[0].cost == 10 * emulated.steps[0].flops


@pytest.mark.parametrize("workspace", [4 * MIB, 25 * MIB])
def test_workspace_is_the_memory_allocated_beside_the_gradients(monkeypatch, workspace):
    monkeypatch.setattr(pointwise_pass, "CPU_COMPILE_LOGITS", float("inf"))
    planned = plan(*SIZES, pairs=2, dtype=torch.float32, device="cpu", workspace_bytes=workspace)
    gradients = 4 * (2 * 1536 * 48 + 4096 * 48)
    seen = peak_of(monkeypatch, make(SHAPE), workspace_bytes=workspace) - gradients
    # An uncompiled pointwise pass also holds a few MiB of temporary blocks.
    assert planned["torch"].workspace_bytes <= seen <= planned["torch"].workspace_bytes + 16 * MIB
    assert 0.75 * workspace < planned["torch"].workspace_bytes <= workspace


def test_a_sweep_s_products_take_twice_the_time():
    sweep, *_, products, _ = plan(*SIZES)["triton"].steps
    assert sweep.cost == 2 * sweep.flops > 200 * sweep.bytes_moved
    assert products.cost == max(products.flops, 200 * products.bytes_moved)


def test_torch_has_the_flops_of_the_dense_floor_and_triton_has_more():
    floor = 2 * 1536 * 4096 * (3 * 48 + 64)
    for name in Divergence:
        plans = plan(*SIZES, divergence=name.value)
        assert plans["dense"].flops == plans["torch"].flops == floor
        again = 1 if name in RELATIVE_ENTROPIES else 2
        assert plans["triton"].flops == floor + again * 2 * 1536 * 4096 * (48 + 64)


def test_more_chunks_move_more_and_hold_less():
    small, large = (
        plan(*SIZES, workspace_bytes=size, device="cpu")["torch"] for size in (MIB, 64 * MIB)
    )
    assert small.bytes_moved > large.bytes_moved
    assert small.workspace_bytes < large.workspace_bytes
    assert small.flops == large.flops


def test_tiles_have_a_16_bit_copy_if_gemms_read_16_bits():
    options = {"device": "cpu", "workspace_bytes": 10**12}
    narrow = plan(*SIZES, dtype=torch.float32, **options)["torch"]
    row = 4096 + 16  # Each row has a cache line of 16 logits as padding.
    assert narrow.workspace_bytes == 1536 * row * 8
    wide = CallShape(
        *SIZES, (Divergence.JSD,), torch.bfloat16, torch.float32, True, True, CUDA, 10**12
    )
    assert wide.bytes_per_row() == row * 8 + 4096 * 2


def test_on_a_gpu_gradients_have_a_buffer_of_their_own(monkeypatch):
    """On a GPU, a tile holds 512 rows of logits of both models, and gradients have another buffer.

    The buffer of gradients holds 1024 rows if the head's gradient is 16-bit, and otherwise 2048.
    Rows of all pairs share the tiles, so five pairs cost as much as one pair of five times the
    tokens.
    """
    row = 4096 + 16
    whole, narrow = (512 * row * 8 + rows * 4096 * 2 for rows in (2048, 1024))
    planned = plan(8192, *SIZES[1:])["torch"]
    assert planned.workspace_bytes == narrow
    for room, held in ((10**12, whole), (whole - 1, 512 * row * 8 + 1920 * 4096 * 2)):
        planned = plan(8192, *SIZES[1:], workspace_bytes=room, head_grad=False)["torch"]
        assert planned.workspace_bytes <= held
        assert planned.workspace_bytes > 0.9 * held
    one, five = plan(5120, *SIZES[1:]), plan(1024, *SIZES[1:], pairs=5)
    assert five["torch"].bytes_moved == one["torch"].bytes_moved
    assert plan(*SIZES, workspace_bytes=1)["torch"].workspace_bytes == row * 8 + 4096 * 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plan(8192, *SIZES[1:])["torch"].workspace_bytes > whole, "without Triton"


def test_the_plan_counts_the_values_that_inductor_s_kernels_move():
    """On a GPU, the committed counts of Inductor's kernels are those of the plan.

    Only the losses of a z-loss move less than planned.
    """
    with (ROOT / "benchmarks/data/offline/inductor_pass.csv").open() as file:
        rows = [*csv.DictReader(file)]
    shape = replace(call_shape(CUDA), features=("label_smoothing",))

    def planned(shape):
        (step,) = [s for s in cost.row_chunks(shape).steps if s.name == "pointwise pass"]
        return step.bytes_moved / (shape.pairs * shape.logits)

    seen = {}
    for row in rows:
        grads = dict.fromkeys(("head_grad", "hidden_grad"), row["gradient"] == "True")
        teacher, ghost = int(row["divergence"] != ""), "ghost" in row["features"]
        each = replace(shape, teacher_width=teacher, ghost=ghost, **grads)
        counted = int(row["bytes_moved"])
        if row["features"] != "z-loss" or teacher:
            assert counted == planned(each), row
        seen[row["features"]] = seen.get(row["features"], ()) + (counted,)
    assert seen.pop("sparse targets, ghost") == (36, 16)
    assert seen.pop("sparse targets, uniform") == (16, 8)
    assert seen.pop("z-loss") == (12, 4, 32, 16)
    assert seen == dict.fromkeys(("label smoothing", "reports", "all three"), (16, 8, 32, 16))
    assert 8 * planned(replace(shape, device=torch.device("cpu"))) == 3 * planned(shape)


@pytest.mark.parametrize("rest", [None, "ghost", "uniform"])
def test_the_plan_knows_which_targets_have_a_ghost_entry(monkeypatch, rest):
    problem = make(Shape((3,), 11, 4, 4, 1), divergence="forward_kl")
    targets = SparseTargets(torch.zeros(3, 2).long(), torch.full((3, 2), 0.2), rest)
    problem.teacher_hidden, problem.teacher_head = targets, None
    shape = CallShape.of(capture_call(monkeypatch, problem))
    assert (shape.listed, shape.ghost) == (2, rest == "ghost")


def test_pairs_multiply_work_but_not_the_workspace_or_the_head_gradient():
    one, five = (plan(*SIZES, pairs=n, device="cpu") for n in (1, 5))
    for name in ("torch", "triton"):
        assert five[name].flops == 5 * one[name].flops
        # The head gradient counts once for all pairs: the first pair does not read it, and the
        # final multiplication and cast run once.
        once = 4096 * 48 * ((2 * 4 + 4 + 2) - 4)
        assert five[name].bytes_moved - once == 5 * (one[name].bytes_moved - once)
        assert five[name].workspace_bytes == one[name].workspace_bytes
    assert five["dense"].workspace_bytes == 5 * one["dense"].workspace_bytes


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        ((0, 5, 5, 5), {}, ValueError, "tokens must be at least 1, got 0"),
        ((5, 5.0, 5, 5), {}, TypeError, "vocab_size must be an int, got float"),
        ((5, 5, 5, True), {}, TypeError, "teacher_width must be an int, got bool"),
        ((5, 5, 5, 5), {"pairs": -1}, ValueError, "pairs must be at least 1, got -1"),
        ((5, 5, 5, 5), {"divergence": "kl"}, ValueError, "divergence='kl' is unknown"),
        ((5, 5, 5, 5), {"workspace_bytes": 0}, ValueError, "workspace_bytes must be at least 1"),
        ((5, 5, 5, 5), {"dtype": torch.int8}, TypeError, "dtype must be one of torch.float32, "),
    ],
)
def test_invalid_sizes_are_refused(sizes, options, error, message):
    with pytest.raises(error, match=message):
        plan(*sizes, **options)
