"""The ``triton`` backend: kernels compute logits tile by tile, and never write them to memory.

Rows are normalised once. Sweep 1 computes the log-sum-exp of every row, for each model. Sweep 2
computes the row sums of ``f`` and ``h`` of a divergence. Sweep 3 writes the gradient of the logits,
a chunk of the vocabulary at a time. Two GEMMs turn this gradient into the gradients of hidden
states and head. No kernel uses an atomic or a lock, and sums have a fixed order: results are
bitwise reproducible.

Each module imports only earlier ones in this order: ``interpreter``, ``kernels``, ``tiles``,
``evaluate``, ``agreement``, ``tune``.
"""

from lens_kernels.backends.triton.evaluate import evaluate

__all__ = ["evaluate"]
