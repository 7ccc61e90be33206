"""The private interfaces of other libraries that only the benchmarks use.

Each docstring states the purpose of an interface, the versions that have it, and the effect if it
is missing. Interfaces that the package also uses are in ``lens_kernels/compat.py``.
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

# The base class of modes that intercept every operator. torch documents its name. Present in torch
# 2.8 to 2.13. Without this class, memory cannot be counted over fake tensors, and some results are
# missing.
DispatchMode = TorchDispatchMode


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a mode in which tensors have sizes but no memory.

    Present in torch 2.8 to 2.13. Without this class, the memory of sizes that do not fit cannot be
    counted.
    """
    return FakeTensorMode()


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Return the tensors in an operator's arguments or results, which may be nested.

    Present in torch 2.8 to 2.13. Without this function, memory cannot be counted over fake tensors.
    """
    return (x for x in tree_iter(tree) if isinstance(x, Tensor))


def body_of(operator: Any) -> Callable[..., Any] | None:
    """Return the function that runs inside a custom operator, or None for any other operator.

    Present in torch 2.8 to 2.13. Without this attribute, no memory is counted inside the operators
    of ``lens_kernels``. The benchmark then stops, because a real run gives another number.
    """
    definition = OPDEFS.get(operator._schema.name)
    return None if definition is None else definition._init_fn


def allocations(profiler: torch.profiler.profile) -> list[int]:
    """Return the bytes of every allocation in order. Releases are negative.

    The profiler's public results have only sums. Its private events are present in torch 2.8 to
    2.13. Without these events, no memory can be measured on a CPU.
    """
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    records: list[Any] = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(records, key=lambda event: event.start_ns())]


def static_sizes() -> AbstractContextManager[None]:
    """Make ``torch.compile`` compile every size separately, also in the code of peers.

    Present in torch 2.8 to 2.13. Without this setting, torch compiles code for dynamic sizes when a
    size changes. That code needed 1.5 times the memory (measured).
    """
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64)
