"""Dispatch modes that record which operators a call runs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Records the name of each operator, and the size of the largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.devices, self.largest = [], set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.devices.add(x.device.type)
                self.largest = max(self.largest, x.numel())
        return result


class Products(TorchDispatchMode):
    """Counts the floating-point operations of GEMMs and the bytes of their operands.

    Torch's own counter ignores in-place GEMMs, and counts no bytes.
    """

    flops = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        assert name not in ("bmm", "baddbmm", "linear", "matmul"), name
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            results = (2 if name == "addmm" else 1) * left.shape[0] * right.shape[1]
            self.bytes += 4 * (left.numel() + right.numel() + results)
        return func(*args, **(kwargs or {}))
