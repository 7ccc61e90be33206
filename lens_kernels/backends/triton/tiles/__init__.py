"""The block sizes (tiles) of kernels: defaults and limits in ``sizes``, tuning, and saved tiles."""
