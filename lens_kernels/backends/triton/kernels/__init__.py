"""The kernels, one quantity to a file, with its launcher beneath it.

Sweeps share ``device_fns`` and ``pointwise`` (elementwise functions), ``logits`` (a tile of
logits), ``operands`` (what they read) and ``launch`` (the tile and the grid). No sweep imports
another one.
"""
