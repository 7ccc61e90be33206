"""Every private interface of another library that this package uses, and nothing else.

Each entry says what it is for, in which versions it was seen, and what happens without it. Nothing
here imports a library at import time, except torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def backward_keeps_graph() -> bool:
    """Say whether the backward pass that is running was called with ``retain_graph=True``.

    Seen in torch 2.8 to 2.13. Without it the answer is True: gradients are then scaled out of
    place, which costs memory and is right in every case.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``torch.compile`` call ``function`` while it traces, and keep the result as a constant.

    This is ``torch.compiler.assume_constant_result``, which would load the compiler at import. Seen
    in torch 2.8 to 2.13. Without it a graph breaks at the function, and nothing else changes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def assert_on_device(condition: Tensor, message: str) -> None:
    """Check a 0-dim condition without making the host wait for the device.

    Seen in torch 2.8 to 2.13. There is no public function for it; without it the call raises.
    """
    torch._assert_async(condition, message)


def recompile_limit(variants: int) -> AbstractContextManager[None]:
    """Let ``torch.compile`` keep that many variants of a function; past the limit it runs eagerly.

    Seen in torch 2.8 to 2.13, the first version that this package supports.
    """
    return torch._dynamo.config.patch(recompile_limit=variants)


def compiler_errors() -> tuple[type[Exception], ...]:
    """Return what Inductor raises where a machine has no working C++ compiler.

    Seen in torch 2.8 to 2.13. Loaded late: importing the compiler takes seconds.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, CppCompileError, InvalidCxxCompiler


def triton_interpreter() -> Any:
    """Return the module of Triton's interpreter, parts of which the ``triton`` backend replaces.

    These are ``InterpreterBuilder.create_dot`` and ``cast_impl``, ``TensorHandle`` and
    ``_patch_lang``. Seen in Triton 3.6 to 3.9. Without them kernels cannot be interpreted.
    """
    from triton.runtime import interpreter

    return interpreter
