"""The private interfaces of other libraries that only the benchmarks use.

Each docstring states the purpose of an interface, the versions that have it, and the effect if it
is missing. Interfaces that the package also uses are in ``lens_kernels/compat.py``.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# The base class of modes that intercept every operator. torch documents its name. Present in torch
# 2.8 to 2.13. Without this class, memory cannot be counted over fake tensors, and some results are
# missing.
DispatchMode = TorchDispatchMode


def fake_tensors(outside: bool = False) -> AbstractContextManager[Any]:
    """Return a mode in which tensors have sizes but no memory.

    If ``outside``, functions may also use real tensors from outside the mode.

    Present in torch 2.8 to 2.13. Without this class, the memory of sizes that do not fit cannot be
    counted.
    """
    return FakeTensorMode(allow_non_fake_inputs=outside)


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


# A build of torch without CUDA has no object that selects the current CUDA device, and then cannot
# index a fake CUDA tensor. This C++ code registers an object that does nothing.
DEVICE_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
constexpr auto CUDA = c10::DeviceType::CUDA;
c10::impl::DeviceGuardImplRegistrar registrar(CUDA, new c10::impl::NoOpDeviceGuardImpl<CUDA>());
}
"""
TRITON_KERNEL = re.compile(
    r"async_compile\.triton\('(\w+)', '{3}\n(.*?)'{3}, device_str", re.DOTALL
)


def register_device_guard() -> None:
    """Let torch index fake CUDA tensors without CUDA. This needs ``g++``.

    ``NoOpDeviceGuardImpl`` is present in torch 2.8 to 2.13, and was tried with 2.13. Without this
    class, the code that Inductor generates for GPUs cannot be counted.
    """
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(DEVICE_GUARD)
        paths = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10"]
        command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run([*command, *paths], check=True)
        ctypes.CDLL(str(library))


@contextmanager
def inductor_for(target: Any, properties: SimpleNamespace) -> Iterator[None]:
    """Make Inductor generate code for a GPU that this machine does not have.

    ``target`` is Triton's, and ``properties`` are those of ``torch.cuda.get_device_properties``.
    Nothing can run. Tried with torch 2.13. Without these interfaces, the code that Inductor
    generates for GPUs cannot be counted.
    """
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import driver

    def zero(*args: Any) -> int:
        return 0

    capability = properties.major, properties.minor
    active = SimpleNamespace(get_current_target=lambda: target, get_current_device=zero)
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_capability", lambda device=None: capability),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (CudaInterface, "is_available", staticmethod(lambda: True)),
        (CudaInterface, "device_count", staticmethod(lambda: 1)),
        (CudaInterface, "current_device", staticmethod(zero)),
        (CudaInterface, "get_device_properties", staticmethod(lambda device=None: properties)),
        (CudaInterface.Worker, "current_device", staticmethod(zero)),
        (
            CudaInterface.Worker,
            "get_device_properties",
            staticmethod(lambda device=None: properties),
        ),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
    ]
    with ExitStack() as stack:
        for each in answers:
            stack.enter_context(mock.patch.object(*each))
        # Inductor's cache asks for more properties of the device. Constants are folded on the
        # device, and that cannot run. The static launcher keeps no machine code.
        options = {
            "fx_graph_cache": False,
            "joint_graph_constant_folding": False,
            "use_static_triton_launcher": False,
        }
        stack.enter_context(torch._inductor.config.patch(options))
        driver.set_active(active)
        yield


class _Generated(Exception):
    """Ends a compilation after Inductor has generated code."""


def generated_kernels(compiled: Callable[..., Any], *args: Any) -> list[tuple[str, str]]:
    """Return name and source of the Triton kernels of a compiled function, one for each launch.

    ``args`` may hold fake CUDA tensors. Present in torch 2.8 to 2.13, and tried with 2.13. Without
    ``_compile_to_module``, the code that Inductor generates for GPUs cannot be counted.
    """
    from torch._inductor.exc import InductorError
    from torch._inductor.graph import GraphLowering

    found: list[str] = []

    def stop(graph: Any) -> None:
        found.append(graph.codegen()[0].value)
        raise _Generated

    with mock.patch.object(GraphLowering, "_compile_to_module", stop):
        try:
            compiled(*args)
        except InductorError:
            if not found:
                raise
    (code,) = found
    kernels = TRITON_KERNEL.findall(code)
    return [kernel for kernel in kernels for _ in range(code.count(f" {kernel[0]}.run("))]


def compile_generated(name: str, source: str) -> tuple[Any, dict[str, int], int]:
    """Compile a kernel that Inductor generated, with its default configuration.

    Return Triton's compiled kernel, its block sizes and the number of warps. Present in torch 2.8
    to 2.13, and tried with 2.13. Without ``_precompile_config``, the instructions of Inductor's
    kernels cannot be counted.
    """
    from torch._inductor.codecache import PyCodeCache

    tuner = getattr(PyCodeCache.load(source), name)
    config = tuner.configs[0]
    result = tuner._precompile_config(config)
    return result.kernel, dict(config.kwargs), config.num_warps
