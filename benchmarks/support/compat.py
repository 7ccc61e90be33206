"""Every private interface of another library that only the benchmarks use.

Each entry says what it is for, in which versions it was seen, and what happens without it. Those
that the package uses too are in ``lens_kernels/compat.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# The class of modes that see every operator. torch documents it under this name. Seen in torch 2.8
# to 2.13; without it fake runs cannot be counted, and those points are missing.
DispatchMode = TorchDispatchMode


def fake_tensors() -> AbstractContextManager[Any]:
    """Make tensors that have sizes and no memory.

    Seen in torch 2.8 to 2.13. Without it, sizes that do not fit cannot be counted.
    """
    return FakeTensorMode()


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Return the tensors in nested arguments, or in the results, of an operator.

    Seen in torch 2.8 to 2.13. Without it, fake runs cannot be counted.
    """
    return (x for x in tree_iter(tree) if isinstance(x, Tensor))


def body_of(operator: Any) -> Callable[..., Any] | None:
    """Return the body of a custom operator, or None for any other operator.

    Seen in torch 2.8 to 2.13. Without it a fake run counts nothing inside ``lens_kernels``' own
    operator, and the comparison with a real run stops the benchmark.
    """
    definition = OPDEFS.get(operator._schema.name)
    return None if definition is None else definition._init_fn


def allocations(profiler: torch.profiler.profile) -> list[int]:
    """Return the bytes of every allocation, and of every release as less than 0, in their order.

    The public results of the profiler have sums only. Seen in torch 2.8 to 2.13. Without it no
    memory is measured on a CPU.
    """
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    records = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(records, key=lambda event: event.start_ns())]


def static_sizes() -> AbstractContextManager[None]:
    """Let ``torch.compile`` compile every size apart, also where a peer calls it.

    Seen in torch 2.8 to 2.13. Without it code for any size is made from the second size on, which
    was measured to take 1.5 times the memory.
    """
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64)
