"""Losses without a teacher model: cross entropy, or distillation from stored sparse targets.

Both losses use only the final hidden states, and never store the logits of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lens_kernels.cross_entropy import linear_cross_entropy
from lens_kernels.functional import distillation_loss
from lens_kernels.hf.cache.key import CacheKey, Indexed
from lens_kernels.hf.cache.targets import TargetCache
from lens_kernels.hf.model.anatomy import lens_head_from, verify_lens
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.families import causal_lm_of
from lens_kernels.hf.model.state import replaced_forward
from lens_kernels.hf.training.collation import targets_of
from lens_kernels.hf.training.config import LensDistillConfig
from lens_kernels.hf.training.objective import Outcome, check_own_loss
from lens_kernels.hf.training.whole_heads import where_head_is_whole
from lens_kernels.inputs import IGNORE_INDEX
from lens_kernels.lens import LensHead
from lens_kernels.targets import SparseTargets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def without_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    args: LensDistillConfig,
    examples: Mapping[str, Indexed | None],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[bool, dict[str, TargetCache]]:
    """Return whether the model must compute its own loss, and the stored sparse targets.

    Raises:
        ValueError: ``teacher_targets`` is set, but the model has no lens, or the targets were made
            from other examples.
    """
    targets: dict[str, TargetCache] = {}
    if args.teacher_targets:
        targets = open_targets(Path(args.teacher_targets), examples, tokenizer)
    if teacher is not None:
        return False, targets
    reason = unsupported_reason(student)
    if reason is not None and targets:
        raise ValueError(f"teacher_targets needs the model's lens: {reason}")
    if reason is not None:
        _log.warning("the model computes its own loss, from all its logits: %s", reason)
    return reason is not None, targets


def unsupported_reason(student: PreTrainedModel) -> str | None:
    """Return the reason why the student must compute its own loss, or None if there is none."""
    try:
        check_own_loss(student)
        verify_lens(student)
    except (ValueError, AttributeError) as error:
        return str(error)
    return None


def final_loss(
    student: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    denominator: Tensor | float | None,
    student_call: nn.Module,
    args: LensDistillConfig,
    cache: TargetCache | None,
) -> Outcome:
    """Return the objective of a batch, from the targets in ``cache`` or from labels alone.

    ``inputs`` are ``input_ids``, ``labels`` and other model inputs, and ``example_id`` if there is
    a cache. Labels have the positions of their own tokens, and are shifted here. ``denominator`` is
    that of ``linear_cross_entropy``. ``student_call`` is the student, or its distributed wrapper.
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels")[..., 1:].flatten()
    count = (labels != IGNORE_INDEX).sum()
    given = count if denominator is None else denominator
    tokens = torch.as_tensor(given, device=count.device).clamp(min=1)
    compare: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    if cache is None:
        compare = partial(_cross_entropy, label_smoothing=args.label_smoothing_factor)
    else:
        targets = targets_of(cache, inputs.pop("example_id", None), int(count), labels.device)
        compare = partial(_from_targets, targets=targets, options=args.loss_options())
    sums: dict[str, Tensor] = {}

    def run(states: Tensor) -> Tensor:
        whole = lens_head_from(student)
        # The final states are already normed, so the head is copied without its norm.
        head = LensHead(whole.weight, whole.bias, scale=whole.scale, softcap=whole.softcap)
        loss, found = compare(states, head, labels.to(states.device), denominator, tokens)
        sums.update(found)
        return loss

    def forward(**received: Tensor) -> dict[str, Tensor]:
        given = {name: received[name] for name in inputs}
        _, final = hidden_states(student, [], given)
        states = final[..., :-1, :].flatten(0, -2)
        return {"loss": where_head_is_whole(student, run)(states)}

    with replaced_forward(causal_lm_of(student), forward):
        loss = student_call(**inputs)["loss"]
    return Outcome(loss, sums, count)


# In both losses, ``states`` and ``labels`` have a row for each token. The label is the next token.
# They return the loss, and its terms summed over ``tokens``.


def _cross_entropy(
    states: Tensor,
    head: LensHead,
    labels: Tensor,
    denominator: Tensor | float | None,
    tokens: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    loss = linear_cross_entropy(
        states, head, labels, denominator=denominator, label_smoothing=label_smoothing
    )
    assert isinstance(loss, Tensor)
    total = loss.detach() * tokens
    return loss, {"loss": total, "ce": total}


def _from_targets(
    states: Tensor,
    head: LensHead,
    labels: Tensor,
    denominator: Tensor | float | None,
    tokens: Tensor,
    targets: SparseTargets,
    options: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    counted = (labels != IGNORE_INDEX).nonzero()[:, 0]
    output = distillation_loss(
        [],
        None,
        head,
        None,
        student_final=states.index_select(0, counted),
        teacher_final=targets,
        labels=labels[counted],
        denominator=denominator,
        **options,
    )
    parts = {"loss": output.loss, "ce": output.ce, "kd": output.kd}
    sums = {k: x.detach() * tokens for k, x in parts.items() if x is not None}
    if options["token_clip"] is not None:
        sums["clipped"] = output.clipped * output.num_tokens
    return output.loss, sums


def open_targets(
    folder: Path, examples: Mapping[str, Indexed | None], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, TargetCache]:
    """Open the stored targets of datasets, in the subfolders ``train`` and ``eval``."""
    datasets = {name: examples[f"{name}_dataset"] for name in ("train", "eval")}
    return {
        name: TargetCache.read(folder / name, CacheKey.of(None, dataset, (), tokenizer))
        for name, dataset in datasets.items()
        if dataset is not None
    }
