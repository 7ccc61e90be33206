"""The pass that is compiled for GPUs without the row kernel: only the number of rows is dynamic."""

import torch

from lens_kernels import divergence as table
from lens_kernels.backends import compiled
from lens_kernels.backends.torch import pointwise_pass
from lens_kernels.lens import LogitMap
from lens_kernels.options import Divergence


def test_only_the_number_of_rows_varies(monkeypatch):
    """The pass is compiled once for each vocabulary size, and not again for other row counts."""
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
        expected = pointwise_pass.tile_pass(zs.clone(), terms, None, False)
        torch.testing.assert_close(tile_pass(zs, terms, None, False), expected)
    assert vocabs == [{50}, {60}]


def test_a_gpu_takes_a_tile_in_one_block():
    gpu = torch.device("cuda")
    assert pointwise_pass.block_rows(gpu, True, 700, 50000) == 700
    assert pointwise_pass.block_rows(gpu, False, 700, 50000) == 43
