"""The compiled pass for GPUs without the row kernel: new numbers of rows do not recompile it."""

import torch

from lens_kernels import divergence as table
from lens_kernels.backends import compiled
from lens_kernels.backends.torch import pointwise_pass
from lens_kernels.backends.torch.passes import Terms
from lens_kernels.lens import LogitMap
from lens_kernels.options import Divergence
from tests.support.grids import ODD
from tests.support.problems import capture_call, make


def test_only_the_number_of_rows_varies(monkeypatch):
    """The pass is compiled once for each vocabulary size, whatever the number of rows is."""
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
    """Meta tensors, which hold no data, replace the tensors on a GPU."""
    call, calls = capture_call(monkeypatch, make(ODD)), []

    def compile(function):
        def recorded(zs, *rest):
            calls.append((function, len(zs)))
            return [zs[:, 0]], []

        return recorded

    monkeypatch.setattr(compiled, "_compile", None)  # a call on a GPU must not use this function
    monkeypatch.setattr(compiled, "_compile_for_gpu", compile)
    made = pointwise_pass.TorchPass(call, torch.float32, 700)
    made.device, made.compiled = torch.device("cuda"), True
    tiles = [torch.empty(700, call.vocab_size, device="meta") for _ in range(2)]
    terms = Terms(Divergence.JSD, torch.empty(700, device="meta"), None, None)
    (losses,) = made.run(tiles, terms, tiles[0], None)
    assert losses.shape == (700,) and calls == [(pointwise_pass.tile_pass, 700)]


def test_an_uncompiled_pass_takes_small_blocks_on_a_gpu():
    """The pass's temporary tensors are as large as a block."""
    assert pointwise_pass.block_rows(torch.device("cuda"), False, 700, 50000) == 43
