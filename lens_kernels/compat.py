"""All private interfaces of other libraries that this package uses.

Each docstring states the purpose of an interface, the versions that have it, and the effect if it
is missing. Importing this module loads only torch.
"""

from __future__ import annotations

import getpass
import importlib
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Trainer
else:  # Type checkers need a base class. At run time, subclasses name their own base class.
    Trainer = object


def backward_keeps_graph() -> bool:
    """Return whether the running backward pass was called with ``retain_graph=True``.

    Present in torch 2.8 to 2.13. Without this attribute, the result is True. Gradients are then
    scaled in a copy, which is correct but takes memory.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``torch.compile`` call ``function`` once and keep the result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but it loads the compiler at import.
    Present in torch 2.8 to 2.13. Without this interface, ``torch.compile`` breaks the graph at the
    function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def assert_on_device(condition: Tensor, message: str) -> None:
    """Check a 0-dim condition without making the host wait for the device.

    Present in torch 2.8 to 2.13. No public function does this. Without this private function, an
    AttributeError is raised.
    """
    torch._assert_async(condition, message)


def process_group(name: str) -> Any:
    """Return the process group whose ``group_name`` is ``name``.

    Operators take names, because their schema has no type for groups. Present in torch 2.8 to 2.13.
    Without this interface, an error is raised.
    """
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d._resolve_process_group
    return resolve(name)


def default_store() -> Any:
    """Return the key-value store that all processes share.

    Present in torch 2.8 to 2.13. Without this attribute, an AttributeError hides which rank ended.
    """
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def dispatch_mode_is_active() -> bool:
    """Return whether a ``TorchDispatchMode`` of the user is active.

    Inside such a mode ``torch.compile`` compiles nothing. A function that is first called there is
    never compiled later. Present in torch 2.8 to 2.13. Without this interface, an error is raised.
    """
    from torch.utils import _python_dispatch

    return _python_dispatch.is_in_torch_dispatch_mode(include_infra_modes=False)


def recompile_limit(variants: int) -> AbstractContextManager[None]:
    """Let ``torch.compile`` compile up to ``variants`` variants of a function, inside this context.

    Other variants run uncompiled. Present in torch 2.8 to 2.13. Without this interface, an error is
    raised.
    """
    return torch._dynamo.config.patch(recompile_limit=variants)


def vary_first_size(x: Tensor) -> None:
    """Make ``torch.compile`` generate code in which the first size of ``x`` may vary.

    Present in torch 2.8 to 2.13. No public function does this. Without this private function, an
    AttributeError is raised.
    """
    torch._dynamo.maybe_mark_dynamic(x, 0)


def tensors_in(values: object) -> list[Tensor]:
    """Return all tensors in nested tuples, lists and dictionaries.

    Present in torch 2.8 to 2.13. Without this function, an error is raised.
    """
    from torch.utils import _pytree

    return [x for x in _pytree.tree_leaves(values) if isinstance(x, Tensor)]


def compiler_cache() -> Path:
    """Return the folder in which torch's compiler stores its results.

    Torch 2.8 to 2.13 use this folder. If a later version uses another folder, nothing checks
    whether that folder can be created, and torch itself raises an error.
    """
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given is not None:
        return Path(given)
    try:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, ImportError, OSError):  # the path contains a number if the user has no name
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}"


def import_compiler(folder: str) -> None:
    """Import torch's compiler, with ``folder`` as its cache folder.

    Present in torch 2.8 to 2.13. Without ``torch._dynamo``, an ImportError is raised.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    try:
        os.environ[name] = folder
        importlib.import_module("torch._dynamo")
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def compiler_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that Inductor raises without a working C++ compiler.

    Present in torch 2.8 to 2.13. Without these classes, an ImportError is raised. The imports are
    inside the function, because they take seconds.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, CppCompileError, InvalidCxxCompiler


def triton_interpreter() -> Any:
    """Return the module of Triton's interpreter.

    The ``triton`` backend replaces ``create_dot`` and ``cast_impl`` of its ``InterpreterBuilder``,
    and uses ``TensorHandle``. Present in Triton 3.6 to 3.9. Without these names, kernels cannot be
    interpreted.
    """
    from triton.runtime import interpreter

    return interpreter


def wrap_language_patch(wrap: Callable[[Any], Any]) -> None:
    """Wrap the interpreter's function that patches ``triton.language``.

    Present in Triton 3.6 to 3.9. Without this function, interpreted kernels are correct, but
    slower.
    """
    interpreter = triton_interpreter()
    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = wrap(interpreter._patch_lang)


def is_compiled(model: object) -> bool:
    """Return whether a model is the result of ``torch.compile``.

    ``_orig_mod`` is the wrapped module in torch 2.8 to 2.13. Without this attribute, compiled
    models are not recognised, and cause errors later.
    """
    return hasattr(model, "_orig_mod")


def class_before_sharding(module: object) -> type:
    """Return the class of a module as it was before ``fully_shard`` replaced it.

    In torch 2.8 to 2.13, the new class has the bases ``(FSDPModule, class)``. No public function
    returns the old class. With other bases, a sharded head is rejected as an unsupported class.
    """
    from torch.distributed.fsdp import FSDPModule  # imported here, because the import is slow

    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, FSDPModule) else kind


def attention_of(model: Any) -> set[str]:
    """Return the names of the attention implementations in a model's configs.

    ``_attn_implementation`` is present in transformers 4.56 to 5.24. Without this attribute, the
    set is empty, and packing refuses models with flash attention if a batch has several rows.
    """
    configs = model.config, model.config.get_text_config()
    return {str(getattr(config, "_attn_implementation", None)) for config in configs}


def forget_preparation(model: object) -> None:
    """Remove the attribute with which accelerate marks a model as prepared for evaluation.

    Present in accelerate 1.1 to 1.15. If it stays, training after an evaluation runs without DDP,
    and the weights of the ranks diverge.
    """
    vars(model).pop("_is_accelerate_prepared", None)


class TrainerHooks(Trainer):
    """Private hooks of ``transformers.Trainer``, under public names.

    A subclass lists this class before ``Trainer`` in its bases, and overrides the public names.
    Present in transformers 4.56 to 5.24.
    """

    extra_columns: tuple[str, ...] = ()
    """Keys of an example that reach the collator although the model does not take them.

    Without the hook the Trainer removes them, and batches have no ``example_id``.
    """

    def write_model(self, output_dir: str | None, state_dict: dict[str, Tensor] | None) -> None:
        """Write the model to a folder. Called for every checkpoint and by ``save_model``.

        Without the hook, checkpoints store the MSE loss's matrices in the student's file.
        """
        super()._save(output_dir, state_dict)

    @property
    def batch_size(self) -> int:
        """Batch size of training, which ``auto_find_batch_size`` can reduce.

        Without the interface an AttributeError is raised.
        """
        return int(self._train_batch_size)

    def after_loading(self, checkpoint: str) -> None:
        """Load further parts of a checkpoint whose weights were just loaded.

        Without the hook, the MSE loss's matrices are random after a run resumes, and after the best
        model is loaded.
        """

    def after_saving(self, checkpoint: Path) -> None:
        """Write further files of a checkpoint. Called after all processes have written theirs.

        Without the hook, checkpoints lack checksums, so nothing detects damage within a file.
        """

    def _save_checkpoint(self, model: Any, trial: Any = None, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(model, trial, *args, **kwargs)
        self.accelerator.wait_for_everyone()
        name = f"checkpoint-{self.state.global_step}"
        self.after_saving(Path(self._get_output_dir(trial=trial)) / name)

    def _inner_training_loop(self, batch_size: Any = None, *args: Any, **kwargs: Any) -> Any:
        # transformers 4.56 passes the batch size of the checkpoint instead of that of the options.
        # A run that resumes on another number of processes would then train on other rows. Without
        # this hook it would do so.
        if not self.args.auto_find_batch_size:
            batch_size = self.args.train_batch_size
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        columns.extend(name for name in self.extra_columns if name not in columns)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        try:
            self.write_model(output_dir, state_dict)
        except ValueError as error:
            if not self.is_deepspeed_enabled:
                raise
            # With DeepSpeed, the Trainer handles any ValueError as a missing setting. It would then
            # write an empty model.
            raise RuntimeError(str(error)) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.after_loading(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.after_loading(str(self.state.best_model_checkpoint))
