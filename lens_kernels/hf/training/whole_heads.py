"""Whole heads where FSDP or DeepSpeed ZeRO-3 shards the parameters of a model.

Both gather a module's parameters while the module is called, and again in its backward pass. So
the loss runs inside the forward call of the student's head. The teacher's head has no backward
pass, and is gathered around the loss.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lens_kernels.hf.model.anatomy import final_norm_of
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.families import causal_lm_of
from lens_kernels.hf.model.state import replaced_forward


def is_partitioned(module: nn.Module) -> bool:
    """Say whether DeepSpeed ZeRO-3 partitions the parameters of a module."""
    return any(hasattr(x, "ds_id") for x in module.parameters())


def where_head_is_whole(student: Any, compare: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run ``compare`` inside the head's forward call if its parameters are sharded separately."""
    head: Any = causal_lm_of(student).get_output_embeddings()
    if is_partitioned(head):
        norm = final_norm_of(student)
        for x in [] if norm is None else norm.parameters():
            # DeepSpeed then gathers the norm too, whenever it gathers the head.
            importlib.import_module("deepspeed").zero.register_external_parameter(head, x)
    elif not isinstance(head, FSDPModule):
        return compare

    def call(*rows: Tensor) -> Any:
        with replaced_forward(head, compare):
            return head(*rows)

    return call


def inside_call(
    model: Any, layers: Sequence[int], inputs: Mapping[str, Any]
) -> tuple[list[Tensor], Tensor]:
    """Return ``hidden_states`` of a model. A sharded model is called as a whole, without its head.

    The call prepares FSDP and DeepSpeed, which a call of the decoder alone would not do.
    """
    inner = causal_lm_of(model)
    if not (isinstance(inner, FSDPModule) or is_partitioned(inner)):
        return hidden_states(model, layers, inputs)
    found: list[tuple[list[Tensor], Tensor]] = []

    def forward(**received: Any) -> dict[str, Any]:
        given = {name: received[name] for name in inputs}
        found.append(hidden_states(model, layers, given))
        return {}

    with replaced_forward(inner, forward):
        model(**inputs)
    return found[0]


def partition(teacher: Any) -> Any:
    """Partition the parameters of a teacher by DeepSpeed ZeRO-3, and return the engine."""
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(teacher.dtype)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # required, and not used
        "zero_optimization": {"stage": 3},
    }
    if precision is not None:
        config[precision] = {"enabled": True}
    engine, *_ = importlib.import_module("deepspeed").initialize(model=teacher, config=config)
    engine.eval()
    return engine


@contextmanager
def whole_head(model: Any) -> Iterator[bool]:
    """Gather head and final norm of a model that needs no gradient, if they are sharded.

    The context's value says whether they are.
    """
    inner = causal_lm_of(model)
    norm = final_norm_of(model)
    parts = [inner.get_output_embeddings(), *([] if norm is None else [norm])]
    with ExitStack() as stack:
        partitioned = [x for part in parts if is_partitioned(part) for x in part.parameters()]
        if partitioned:
            zero = importlib.import_module("deepspeed").zero
            stack.enter_context(zero.GatheredParameters(partitioned))
        owners = _owners(inner, parts)
        for owner in owners:
            owner.unshard()
            stack.callback(owner.reshard)
        yield bool(partitioned or owners)


@contextmanager
def whole_model(model: Any) -> Iterator[None]:
    """Gather all parameters of a model that DeepSpeed ZeRO-3 partitions."""
    if model is None or not is_partitioned(model):
        yield
        return
    with importlib.import_module("deepspeed").zero.GatheredParameters(list(model.parameters())):
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
