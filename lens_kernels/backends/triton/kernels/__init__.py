"""The kernels. Each file has the kernel of one quantity, followed by the function that launches it.

Sweeps share ``device_fns`` and ``pointwise`` (elementwise functions), ``logits`` (a tile of
logits), ``operands`` (their inputs) and ``launch`` (the tile and the grid). No sweep imports
another sweep.
"""
