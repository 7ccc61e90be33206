"""The ``triton`` backend: tiles of the vocabulary, whose logits never leave the chip.

Rows are normalised once. Sweep 1 makes the log-sum-exp of every row, for each model; sweep 2 the
row sums of a divergence's ``f`` and ``h``; sweep 3 the logits' gradient, a chunk of the vocabulary
at a time, from which two products make the gradients of hidden states and head. No kernel uses an
atomic or a lock, and sums are in a fixed order: results are the same bit for bit from run to run.
"""

from lens_kernels.backends.triton.evaluate import evaluate

__all__ = ["evaluate"]
