"""The Triton kernels. Each file has a kernel, followed by the function that launches it.

The modules ``device_fns``, ``pointwise``, ``logits``, ``operands``, ``targets`` and ``launch`` are
shared. No kernel's module imports the module of another kernel that runs over the logits.
"""
