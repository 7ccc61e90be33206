"""Runs the loss while FSDP or DeepSpeed ZeRO-3 has gathered a sharded model's output head.

FSDP and DeepSpeed gather a module's parameters while the module is called, and again in its
backward pass. So the loss runs inside the forward call of the student's head. The teacher's head
has no backward pass. It is gathered before the loss and released afterwards.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lens_kernels.hf.model.anatomy import final_norm_of
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.families import causal_lm_of
from lens_kernels.hf.model.state import gathered, replaced_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_partitioned(module: nn.Module) -> bool:
    """Return whether DeepSpeed ZeRO-3 partitions the parameters of a module."""
    return any(hasattr(x, "ds_id") for x in module.parameters())


def where_head_is_whole(
    student: PreTrainedModel, compare: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Make ``compare`` run inside the call of the student's head, if that head is sharded."""
    head = causal_lm_of(student).get_output_embeddings()
    if is_partitioned(head):
        norm = final_norm_of(student)
        for x in [] if norm is None else norm.parameters():
            # Make DeepSpeed gather the norm whenever it gathers the head.
            importlib.import_module("deepspeed").zero.register_external_parameter(head, x)
    elif not isinstance(head, FSDPModule):
        return compare

    def call(*rows: Tensor) -> Tensor:
        with replaced_forward(head, compare):
            return head(*rows)

    return call


def inside_call(
    model: PreTrainedModel, layers: Sequence[int], inputs: Mapping[str, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return the result of ``hidden_states``, computed inside a call of the model if it is sharded.

    FSDP and DeepSpeed need a call of the whole model, not only of its decoder. The model's head
    does not run.
    """
    inner = causal_lm_of(model)
    if not (isinstance(inner, FSDPModule) or is_partitioned(inner)):
        return hidden_states(model, layers, inputs)
    found: list[tuple[list[Tensor], Tensor]] = []

    def forward(**received: Tensor) -> dict[str, Tensor]:
        given = {name: received[name] for name in inputs}
        found.append(hidden_states(model, layers, given))
        return {}

    with replaced_forward(inner, forward):
        model(**inputs)
    return found[0]


def partition(teacher: PreTrainedModel) -> nn.Module:
    """Partition a teacher's parameters with DeepSpeed ZeRO-3, and return DeepSpeed's engine."""
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(teacher.dtype)
    config: dict[str, object] = {
        # DeepSpeed requires a batch size, which has no effect here
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
    }
    if precision is not None:
        config[precision] = {"enabled": True}
    engine, *_ = importlib.import_module("deepspeed").initialize(model=teacher, config=config)
    engine.eval()
    return engine


@contextmanager
def whole_head(model: PreTrainedModel) -> Iterator[bool]:
    """Gather a frozen model's head and final norm inside the context, if they are sharded.

    The context yields whether head and norm are sharded.
    """
    inner = causal_lm_of(model)
    norm = final_norm_of(model)
    parts = [inner.get_output_embeddings(), *([] if norm is None else [norm])]
    with ExitStack() as stack:
        partitioned = stack.enter_context(gathered(x for part in parts for x in part.parameters()))
        owners = _owners(inner, parts)
        for owner in owners:
            owner.unshard()
            stack.callback(owner.reshard)
        yield partitioned or bool(owners)


@contextmanager
def whole_model(model: PreTrainedModel | None) -> Iterator[None]:
    """Gather a model's parameters inside the context, if DeepSpeed ZeRO-3 partitions them."""
    with gathered([] if model is None else model.parameters()):
        yield


def _owners(inner: nn.Module, parts: list[nn.Module]) -> list[FSDPModule]:
    """Return the FSDP modules that gather the parameters of ``parts``."""
    modules = dict(inner.named_modules())
    owners: list[FSDPModule] = []
    for name, module in modules.items():
        if not any(module is part for part in parts):
            continue
        steps = name.split(".") if name else []
        above = [modules[".".join(steps[:i])] for i in range(len(steps), -1, -1)]
        nearest = next((x for x in above if isinstance(x, FSDPModule)), None)
        if nearest is not None and not any(nearest is x for x in owners):
            owners.append(nearest)
    return owners
