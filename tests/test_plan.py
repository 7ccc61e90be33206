"""What a call is said to cost, against operations and allocations that are counted."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lens_kernels import plan
from lens_kernels.backends import tile_pass, torch_chunked
from lens_kernels.spec import RELATIVE_ENTROPIES, Divergence
from tests.grids import Shape
from tests.problems import capture_call, make
from tests.test_memory import MIB, evaluate, peak_bytes

SHAPE = Shape((1536,), 4096, 48, 64, 2)
SIZES = (1536, 4096, 48, 64)


class Products(TorchDispatchMode):
    """Counts operations of matrix products; torch's own counter passes over in-place ones."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0].rstrip("_")
        assert name not in ("bmm", "baddbmm", "linear", "matmul"), name
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("head_grad", [True, False])
@pytest.mark.parametrize("workspace", [4 * MIB, 4096 * MIB])
def test_operations_are_those_that_are_counted(monkeypatch, workspace, head_grad):
    made = make(SHAPE)
    if not head_grad:
        made.student_head.weight.requires_grad_(False)
    captured = capture_call(monkeypatch, made, workspace_bytes=workspace)
    with torch.no_grad(), Products() as products:
        torch_chunked.evaluate(captured)
    planned = plan(*SIZES, pairs=2, dtype=torch.float32, device="cpu", head_grad=head_grad)
    assert products.flops == planned["torch"].flops


@pytest.mark.parametrize("workspace", [4 * MIB, 24 * MIB])
def test_workspace_is_what_is_allocated_beside_the_gradients(monkeypatch, workspace):
    monkeypatch.setattr(tile_pass, "CPU_COMPILE_LOGITS", float("inf"))
    captured = capture_call(monkeypatch, make(SHAPE), workspace_bytes=workspace)
    planned = plan(*SIZES, pairs=2, dtype=torch.float32, device="cpu", workspace_bytes=workspace)
    gradients = 4 * (2 * 1536 * 48 + 4096 * 48)
    seen = peak_bytes(evaluate(captured)) - gradients
    # Besides the tiles an eager pointwise pass holds blocks of some MiB.
    assert planned["torch"].workspace_bytes <= seen <= planned["torch"].workspace_bytes + 16 * MIB
    assert 0.75 * workspace < planned["torch"].workspace_bytes <= workspace


def test_the_torch_backend_makes_the_products_of_the_dense_floor_and_triton_more():
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


def test_sixteen_bit_tiles_have_a_copy_where_products_take_one():
    wide = plan(*SIZES, dtype=torch.bfloat16, workspace_bytes=10**12)["torch"]
    narrow = plan(*SIZES, dtype=torch.float32, workspace_bytes=10**12)["torch"]
    assert wide.workspace_bytes == 1536 * 4096 * (8 + 2)
    assert narrow.workspace_bytes == 1536 * 4096 * 8


def test_pairs_multiply_work_but_not_the_workspace():
    one, five = (plan(*SIZES, pairs=n) for n in (1, 5))
    for name in ("torch", "triton"):
        assert five[name].flops == 5 * one[name].flops
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
        ((5, 5, 5, 5), {"workspace_bytes": 0}, ValueError, "workspace_bytes must be positive"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, options, error, message):
    with pytest.raises(error, match=message):
        plan(*sizes, **options)
