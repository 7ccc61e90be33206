"""The block sizes (tiles) of the Triton kernels: defaults, tuning, and a file of tuned tiles."""
