"""The kernels: one file for each quantity, with its launcher below its kernel.

Sweeps share ``device_fns`` and ``pointwise`` (elementwise functions), ``logits`` (a tile of
logits), ``operands`` (their inputs) and ``launch`` (the tile and the grid). No sweep imports
another sweep.
"""
