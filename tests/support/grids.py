"""The shapes and options of the functional tests."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lens_kernels.backends.torch.layout import row_stride

# All backends that must agree with the oracle. Add a new backend here.
BACKENDS = ["torch", "triton"]
# ``row_kernel`` and ``cluster_kernel`` are the ``torch`` backend as on a GPU, with an interpreted
# kernel. They are slow, so some tests run them only if slow tests are selected.
ROW_KERNEL, CLUSTER_KERNEL = "row_kernel", "cluster_kernel"
WITH_SLOW_ROW_KERNEL = [
    *BACKENDS,
    *(pytest.param(name, marks=pytest.mark.slow) for name in (ROW_KERNEL, CLUSTER_KERNEL)),
]
# Backends that support float64. All other backends raise an error.
FLOAT64_BACKENDS = ["torch"]
# Each backend with each dtype in which it can compute.
PRECISIONS = [
    *((backend, torch.float32) for backend in (*BACKENDS, ROW_KERNEL)),
    *((backend, torch.float64) for backend in FLOAT64_BACKENDS),
]

DIVERGENCES = ["jsd", "jeffreys", "forward_kl", "reverse_kl", "tvd", "hellinger"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a call: leading dimensions, vocabulary, hidden sizes, number of lens pairs."""

    leading: tuple[int, ...]
    vocab: int
    student: int
    teacher: int
    pairs: int

    @property
    def tokens(self) -> int:
        return torch.Size(self.leading).numel()


ODD = Shape((37,), 211, 29, 41, 1)
BATCH = Shape((5, 7), 97, 33, 17, 2)
# On a CPU, the torch backend multiplies 768 columns at a time. A vocabulary of 1601 takes three
# GEMMs, and two steps of the pointwise pass.
TWO_TILES = Shape((2, 167), 1601, 24, 40, 1)
SHAPES = {
    # All sizes are prime numbers, so that no chunk, tile or vector divides them. The teacher has
    # the larger hidden size.
    "odd": ODD,
    # Two leading dimensions, which differ from the number of pairs. The teacher has the smaller
    # hidden size.
    "batch": BATCH,
    # All sizes except the number of pairs are powers of two. A chunk could hold many more tokens.
    "aligned": Shape((4,), 64, 16, 16, 3),
    # A single token is an edge case of means, sums and chunks.
    "one_row": Shape((1,), 53, 8, 9, 1),
    # The shape takes two blocks of rows, and three splits of two tiles, so that kernels loop and
    # merge splits.
    "splits": Shape((70,), 680, 24, 40, 1),
    # The vocabulary and the teacher's hidden size are as small as possible.
    "smallest": Shape((4, 3), 2, 2, 1, 2),
    # The hidden size exceeds the vocabulary size.
    "wide": Shape((3, 2), 5, 130, 70, 1),
}

# Options of a head or a call: first each option alone, then many of them together.
FEATURES = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "cold": {"temperature": 0.6},
    "bias": {"bias": True},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 2.0},
    "rms": {"norm": "rms"},
    "rms_offset": {"norm": "rms", "offset": 1.0},
    "rms_plain": {"norm": "rms", "norm_weight": False},
    "layer_bias": {"norm": "layer", "norm_bias": True},
    "everything": {
        "temperature": 1.7,
        "bias": True,
        "scale": 1.3,
        "softcap": 3.0,
        "norm": "layer",
        "norm_bias": True,
        "offset": 0.5,
    },
}


def several_chunks(shape: Shape, rows: int = 5) -> int:
    """Return the ``workspace_bytes`` that make chunks of ``rows`` rows.

    Each row takes the fp32 logits of both models.
    """
    return rows * row_stride(shape.vocab) * 2 * 4
