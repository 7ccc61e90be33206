"""The ``triton`` backend: kernels compute logits tile by tile, and never write them to memory.

Hidden states are normalised once. Then three sweeps run over the vocabulary. Sweep 1 computes each
row's log-sum-exp, for each model. Sweep 2 computes the row sums of a divergence's ``f`` and ``h``.
Sweep 3 writes the gradient of the logits, a chunk of the vocabulary at a time. Two GEMMs turn this
gradient into the gradients of hidden states and head. Kernels use no atomics or locks, and add in a
fixed order, so results are bitwise reproducible.

Each module imports only earlier ones in this order: ``interpreter``, ``kernels``, ``tiles``,
``sparse``, ``evaluate``, ``agreement``, ``tune``.
"""

from lens_kernels.backends.triton.evaluate import evaluate

__all__ = ["evaluate"]
