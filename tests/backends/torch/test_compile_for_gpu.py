"""The compiled pass for GPUs without the row kernel: any number of rows takes one compilation."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lens_kernels import divergence as table
from lens_kernels.backends import compiled
from lens_kernels.backends.torch import pointwise_pass
from lens_kernels.backends.torch.passes import Terms
from lens_kernels.lens import LogitMap
from lens_kernels.options import Divergence
from tests.support.grids import ODD
from tests.support.problems import capture_call, make


def test_only_the_number_of_rows_varies(monkeypatch):
    """The pass is compiled once for each vocabulary size, for any number of rows."""
    torch._dynamo.reset()
    vocabs = []

    def backend(graph, inputs):
        vocabs.append({x.shape[1] for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 2})
        return graph

    def compile(function, dynamic, options):
        assert options == {"split_reductions": False}
        return original(function, dynamic=dynamic, backend=backend)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    tile_pass = compiled._compile_for_gpu.__wrapped__(pointwise_pass.tile_pass)
    formula, one = table.pointwise(Divergence.JSD, 0.5), torch.tensor(1.0)
    for rows, vocab in ((7, 50), (9, 50), (30, 50), (7, 60), (9, 60)):
        zs, zt, weight = torch.randn(rows, vocab), torch.randn(rows, vocab), torch.ones(rows)
        maps = LogitMap(None, one), LogitMap(None, one)
        terms = pointwise_pass.Comparison(zt, weight, *maps, formula, (one / 2, one / 2))
        expected = pointwise_pass.tile_pass(zs.clone(), terms, [], False)
        torch.testing.assert_close(tile_pass(zs, terms, [], False), expected)
    assert vocabs == [{50}, {60}]


def test_a_gpu_takes_a_tile_in_one_block_with_its_own_settings(monkeypatch):
    """Meta tensors, which hold no data, replace tensors on a GPU."""
    call, calls = capture_call(monkeypatch, make(ODD)), []

    def compile(function):
        def recorded(zs, *rest):
            calls.append((function, len(zs)))
            return [zs[:, 0]], []

        return recorded

    # calls on a GPU must not use the compiled function for CPUs
    monkeypatch.setattr(compiled, "_compile", None)
    monkeypatch.setattr(compiled, "_compile_for_gpu", compile)
    made = pointwise_pass.TorchPass(call, torch.float32, 700)
    made.device, made.compiled = torch.device("cuda"), True
    tiles = [torch.empty(700, call.vocab_size, device="meta") for _ in range(2)]
    terms = Terms(Divergence.JSD, torch.empty(700, device="meta"), None, None)
    (losses,) = made.run(tiles, terms, tiles[0], None)
    assert losses.shape == (700,) and calls == [(pointwise_pass.tile_pass, 700)]


@pytest.mark.parametrize("features", ["label smoothing", "z-loss", "token_clip", "standardize"])
def test_numbers_on_the_cpu_meet_rows_on_a_gpu(monkeypatch, features):
    """Numbers of a call stay on the CPU, and only 0-dim tensors may. Fake tensors check this."""
    options = {
        "label smoothing": {"label_smoothing": 0.1},
        "z-loss": {"z_loss": 0.1, "reports": True},
        "token_clip": {"token_clip": 1.0},
        "standardize": {"standardized": (True,)},
    }
    call = replace(capture_call(monkeypatch, make(ODD)), **options[features])
    made = pointwise_pass.TorchPass(call, torch.float32, 4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        row = torch.empty(4, device="meta")
        tiles = [torch.empty(4, call.vocab_size, device="meta") for _ in range(2)]
        own = features == "standardize"
        terms = Terms(Divergence.JSD, row, row.long(), row, standardized=own)
        losses, at_ids = pointwise_pass.tile_pass(*made.arguments(tiles, terms, slice(0, 4)), True)
    assert [x.shape for x in losses] == [(4,)] * (2 + 2 * call.reports)
    assert [x.shape for x in at_ids] == [(4, 1)]


def test_an_uncompiled_pass_takes_small_blocks_on_a_gpu():
    """The temporary tensors of an uncompiled pass are as large as its blocks."""
    assert pointwise_pass.block_rows(torch.device("cuda"), False, 700, 50000) == 43
