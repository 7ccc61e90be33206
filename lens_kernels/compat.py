"""Every private interface of another library that this package uses, and nothing else.

Each entry says what it is for, in which versions it was seen, and what happens without it. Nothing
here imports a library at import time, except torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Trainer
else:  # transformers' own Trainer stands behind TrainerHooks in the bases of its subclass
    Trainer = object


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


def vary_first_size(x: Tensor) -> None:
    """Let code that ``torch.compile`` makes take ``x`` with any first size.

    Seen in torch 2.8 to 2.13. There is no public function for it; without it the call raises.
    """
    torch._dynamo.maybe_mark_dynamic(x, 0)


def tensors_in(values: object) -> list[Tensor]:
    """Return the tensors in nested tuples.

    Seen in torch 2.8 to 2.13. Without it the call raises.
    """
    from torch.utils import _pytree

    return [x for x in _pytree.tree_leaves(values) if isinstance(x, Tensor)]


def compiler_errors() -> tuple[type[Exception], ...]:
    """Return what Inductor raises where a machine has no working C++ compiler.

    Seen in torch 2.8 to 2.13. Loaded late: importing the compiler takes seconds.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, CppCompileError, InvalidCxxCompiler


def triton_interpreter() -> Any:
    """Return the module of Triton's interpreter, parts of which the ``triton`` backend replaces.

    These are ``InterpreterBuilder.create_dot`` and ``cast_impl``, and ``TensorHandle``. Seen in
    Triton 3.6 to 3.9. Without them kernels cannot be interpreted.
    """
    from triton.runtime import interpreter

    return interpreter


def wrap_language_patch(wrap: Callable[[Any], Any]) -> None:
    """Replace the interpreter's function that patches ``triton.language`` by ``wrap`` of it.

    Seen in Triton 3.6 to 3.9. Without it interpreted kernels take longer, and are right.
    """
    interpreter = triton_interpreter()
    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = wrap(interpreter._patch_lang)


def class_before_sharding(module: object) -> type:
    """Return the class of a module as it was before ``fully_shard`` replaced it.

    Seen in torch 2.8 to 2.13, where the new class has the bases ``(FSDPModule, class)``. There is
    no public function for it; without it a sharded head is refused as one that is not plain.
    """
    from torch.distributed.fsdp import FSDPModule  # loads much that a call does not need

    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, FSDPModule) else kind


def forget_preparation(model: object) -> None:
    """Remove the mark of a model that accelerate has prepared for an evaluation.

    Seen in accelerate 1.1 to 1.15. Without it, training after an evaluation runs without DDP, and
    the ranks drift apart.
    """
    vars(model).pop("_is_accelerate_prepared", None)


class TrainerHooks(Trainer):
    """Hooks of ``transformers.Trainer`` that have no public name, each under a name of ours.

    A subclass names this class before ``Trainer`` and overrides what is public here. Seen in
    transformers 4.56 to 5.24.
    """

    extra_columns: tuple[str, ...] = ()
    """Keys of an example that reach the collator although no model takes them.

    Without the hook the Trainer removes them, and a batch has no ``example_id``.
    """

    def write_model(self, output_dir: str | None, state_dict: dict[str, Tensor] | None) -> None:
        """Write the model to a folder; every checkpoint and ``save_model`` come here.

        Without the hook checkpoints hold the matrices of MSE among the student's weights.
        """
        super()._save(output_dir, state_dict)

    def after_loading(self, checkpoint: str) -> None:
        """Take further parts from a folder whose weights were just loaded.

        Without the hook a resumed run, and the best model, have random matrices of MSE.
        """

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        columns.extend(name for name in self.extra_columns if name not in columns)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.write_model(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.after_loading(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.after_loading(str(self.state.best_model_checkpoint))
