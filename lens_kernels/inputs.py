"""The tensors of a public call, which are checked before any computation and then flattened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lens_kernels import compat, sharding
from lens_kernels.lens import LensHead, compute_dtype
from lens_kernels.options import LossOptions
from lens_kernels.targets import SparseTargets, TargetRows, sum_is_valid, target_rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORE_INDEX = -100
Hidden = Tensor | Sequence[Tensor]
Head = LensHead | Tensor


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """The hidden states of a model, and its heads. All have names for error messages.

    ``head_names`` has the name of each state's head. They differ if there are several teachers. The
    norm of a head applies to the first ``lenses`` states. Any other state is final, and is already
    normed.
    """

    named_hidden: list[tuple[str, Tensor]]
    heads: dict[str, LensHead]
    head_names: list[str]
    lenses: int

    @property
    def head(self) -> LensHead:
        """Return the head of the first state."""
        return self.heads[self.head_names[0]]

    @property
    def hidden(self) -> list[Tensor]:
        """Return the hidden states, ``(N, D)`` each."""
        return [x.reshape(-1, x.shape[-1]) for _, x in self.named_hidden]


@dataclass(frozen=True, eq=False)
class Inputs:
    """All tensors of a call, over ``N`` tokens.

    ``teacher`` is None for cross entropy alone. ``labels`` is 0 for tokens without a label.
    ``operand_dtype`` is the dtype to which autocast rounds GEMM factors, or None. ``shard`` is this
    rank's part of the ``vocab_size`` entries, or None without sharding.
    """

    student: ModelInputs
    teacher: ModelInputs | None
    leading_shape: torch.Size
    mask: Tensor | None
    labels: Tensor | None
    has_label: Tensor | None
    vocab_size: int
    operand_dtype: torch.dtype | None
    shard: sharding.VocabularyShard | None = None
    targets: TargetRows | None = None

    @property
    def device(self) -> torch.device:
        """Return the device of all tensors."""
        return self.student.head.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of logits and losses."""
        theirs = self.teacher.heads if self.teacher else {}
        return compute_dtype(self.student.head, *theirs.values())

    @property
    def result_dtype(self) -> torch.dtype:
        """Return the dtype of results, which depends only on the student's head."""
        return compute_dtype(self.student.head)

    def counted(self) -> Tensor:
        """Return 1 for each token that counts, and 0 for all others, ``(N,)``."""
        if self.mask is None:
            tokens = self.leading_shape.numel()
            return torch.ones(tokens, dtype=self.compute_dtype, device=self.device)
        return self.mask.to(self.compute_dtype)

    def labelled(self) -> Tensor | None:
        """Return 1 for each token that counts and has a label, and 0 for all others, ``(N,)``."""
        return None if self.has_label is None else self.counted() * self.has_label


def model_inputs(
    side: str, hidden: Any, head: Any, *finals: Any, process_group: Any = None
) -> ModelInputs:
    """Check one model's tensors.

    Error messages prefix the arguments with ``side``, as in ``student_hidden``, unless ``side`` is
    empty. With a final state in ``finals``, ``hidden`` may be empty.
    """
    prefix = f"{side}_" if side else ""
    name, head_name = f"{prefix}hidden", f"{prefix}head"
    values = [hidden] if isinstance(hidden, Tensor) else hidden
    if not isinstance(values, (list, tuple)):
        kind = type(values).__name__
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {kind}")
    if not values and not finals:
        raise ValueError(f"{name} is empty: pass one hidden state for each lens pair")
    single = isinstance(hidden, Tensor)
    named = [(name if single else f"{name}[{i}]", x) for i, x in enumerate(values)]
    named += [(f"{prefix}final", final) for final in finals]
    for name, x in named:
        check_float(name, x)
        if x.dim() < 2:
            raise ValueError(
                f"{name} must have shape (..., D) with at least one leading dimension,"
                f" got {tuple(x.shape)}"
            )
    given, names = [head] * len(named), [head_name] * len(named)
    if side == "teacher" and isinstance(head, (list, tuple)):
        if len(head) != len(named):
            raise ValueError(
                f"{head_name} has {len(head)} heads for {len(named)} hidden states: pass one head"
                " for each"
            )
        # The same head at several states has one name, so that its tensors are read once.
        firsts = [next(i for i, x in enumerate(head) if x is each) for each in head]
        given, names = [*head], [f"{head_name}[{i}]" for i in firsts]
    heads: dict[str, LensHead] = {}
    for name, each in zip(names, given, strict=True):
        if name not in heads:
            own = [i for i in range(len(values)) if names[i] == name]
            heads[name] = _head_of(name, each, named, own, process_group)
    if side == "teacher":  # the teacher gets no gradient
        named = [(name, x.detach()) for name, x in named]
        heads = {name: each.map(torch.Tensor.detach) for name, each in heads.items()}
    return ModelInputs(named, heads, names, len(values))


def _head_of(
    name: str, head: Any, named: list[tuple[str, Tensor]], lenses: list[int], process_group: Any
) -> LensHead:
    """Check a head, and apply its translators to the states ``named`` with indices ``lenses``."""
    if isinstance(head, Tensor):
        head = LensHead(head)
    if not isinstance(head, LensHead):
        raise TypeError(
            f"{name} must be a LensHead or a (V, D) tensor, got {type(head).__name__}"
            " (for a Hugging Face model: lens_kernels.hf.lens_head_from(model))"
        )
    if process_group is not None:
        head = sharding.local_head(name, head, process_group)
    _check_head(name, head)
    if head.translator is None:
        return head
    translated = head.translated([named[i][1] for i in lenses])
    for i, x in zip(lenses, translated, strict=True):
        named[i] = named[i][0], x
    return replace(head, translator=None)


def check_inputs(
    student: ModelInputs,
    teacher: ModelInputs | None,
    options: LossOptions,
    *,
    mask: Any,
    labels: Any = None,
    ignore_index: int = IGNORE_INDEX,
    targets: SparseTargets | None = None,
    process_group: Any = None,
) -> Inputs:
    """Check that the tensors of a call fit together, and return them.

    ``ignore_index`` is the label of positions without a label. Without ``mask``, tokens with a
    label count. Without ``mask`` and ``labels``, all tokens count. With a ``process_group``, all
    ranks must have the same ``options``.
    """
    device = student.head.weight.device
    models = [student] if teacher is None else [student, teacher]
    if student.lenses != models[-1].lenses:
        raise ValueError(
            "student_hidden and teacher_hidden must pair up:"
            f" got {student.lenses} and {models[-1].lenses} hidden states"
        )
    autocast = torch.is_autocast_enabled(device.type)
    for model in models:
        for name, head in model.heads.items():
            check_device(f"{name}.weight", head.weight, device)
        _check_widths_and_dtypes(model, autocast)
    shape = _leading_shape([named for model in models for named in model.named_hidden])
    sizes = {name: head.weight.shape[0] for model in models for name, head in model.heads.items()}
    flat_mask = _token_mask(mask, shape, device)
    flat_labels = has_label = shard = None
    if process_group is None:
        size = sharding.shared_vocabulary(options.vocab_size, sizes)
    else:
        reached = [x for _, x in student.named_hidden] + [*student.head.tensors().values()]
        implied = None if labels is None else labels != IGNORE_INDEX
        counted = implied if flat_mask is None else flat_mask
        rest = None if targets is None else (targets.rest,)  # it decides what is reduced
        same = sharding.agreed(shape, counted, reached, {**vars(options), "rest": rest})
        rows = sharding.gather(process_group, sizes, same, device)
        totals = {name: sum(x) for name, x in rows.items()}
        size = sharding.shared_vocabulary(options.vocab_size, totals)
        shard = sharding.shard_of(process_group, rows, size)
    if labels is not None:
        flat = _token_labels(labels, shape, device, size, ignore_index)
        has_label = flat != ignore_index
        flat_labels = flat.where(has_label, 0)
        flat_mask = has_label if flat_mask is None else flat_mask
    sparse = None
    if targets is not None:
        _check_targets(targets, shape, device, size, flat_mask)
        sparse = target_rows(targets, size, compute_dtype(student.head))
    return Inputs(
        student=student,
        teacher=teacher,
        leading_shape=shape,
        mask=flat_mask,
        labels=flat_labels,
        has_label=has_label,
        vocab_size=size,
        operand_dtype=torch.get_autocast_dtype(device.type) if autocast else None,
        shard=shard,
        targets=sparse,
    )


def _check_targets(
    targets: SparseTargets,
    shape: torch.Size,
    device: torch.device,
    vocab_size: int,
    mask: Tensor | None,
) -> None:
    for name in ("token_ids", "probabilities"):
        value, name = getattr(targets, name), f"SparseTargets.{name}"
        check_dense(name, value)
        check_device(name, value, device)
        if value.shape[:-1] != shape:
            raise ValueError(
                f"{name} must have shape {(*shape, 'K')}, got {tuple(value.shape)}: its leading"
                " dimensions are those of the hidden states"
            )
    masked = False if mask is None else ~mask[:, None]
    ids = targets.token_ids.reshape(-1, targets.token_ids.shape[-1])
    inside = (ids >= 0) & (ids < vocab_size)
    check_values("SparseTargets.token_ids", inside | masked, f"must be in [0, {vocab_size})")
    requirement = "must be finite and 0 or more"
    if targets.rest is not None:
        requirement += ", with a sum in (0, 1] at each position"
    check_values("SparseTargets.probabilities", sum_is_valid(targets) | masked, requirement)


def check_float(name: str, x: Any) -> None:
    """Check that ``x`` is a dense tensor with a supported floating-point dtype."""
    check_dense(name, x)
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor: gather it once before the call, with {name}.full_tensor()"
        )
    if x.dtype not in FLOATS:
        known = ", ".join(map(str, FLOATS))
        raise TypeError(f"{name} must be floating point ({known}), got {x.dtype}")


def check_dense(name: str, x: Any) -> None:
    """Check that ``x`` is a tensor, and neither sparse nor nested."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested or x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} tensor: convert it first")


def _check_head(name: str, head: LensHead) -> None:
    weight = head.weight
    check_float(f"{name}.weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"{name}.weight must have shape (V, D), got {tuple(weight.shape)}"
            + (" (a partitioned parameter must be gathered first)" if weight.numel() == 0 else "")
        )
    vocab_size, width = weight.shape
    sizes = {"bias": vocab_size, "norm_weight": width, "norm_bias": width}
    for key, x in head.tensors().items():
        if key == "weight":
            continue
        part, size = f"{name}.{key.replace('_', '.')}", sizes[key]
        check_float(part, x)
        if tuple(x.shape) != (size,):
            raise ValueError(
                f"{part} must have shape ({size},) to go with {name}.weight"
                f" {tuple(weight.shape)}, got {tuple(x.shape)}"
            )
        check_device(part, x, weight.device)


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Check that ``x`` is on ``device``."""
    if x.device != device:
        raise ValueError(
            f"{name} is on {x.device}, but the student head is on {device}: move {name} there"
        )


def _check_widths_and_dtypes(model: ModelInputs, autocast: bool) -> None:
    """Check that hidden states fit the head of their model.

    Their dtypes may differ. But without autocast, hidden states are float64 if and only if the head
    is float64.
    """
    for (name, x), head_name in zip(model.named_hidden, model.head_names, strict=True):
        weight = model.heads[head_name].weight
        check_device(name, x, weight.device)
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{name} has width {x.shape[-1]}, but {head_name}.weight"
                f" {tuple(weight.shape)} reads width {weight.shape[1]}"
            )
        if (x.dtype is torch.float64) != (weight.dtype is torch.float64) and not autocast:
            raise TypeError(
                f"{name} is {x.dtype} but {head_name}.weight is {weight.dtype}: convert one of"
                " them, so that both or neither are float64 (the other dtypes may differ)"
            )


def _leading_shape(named: Sequence[tuple[str, Tensor]]) -> torch.Size:
    """Return the leading dimensions, which all hidden states must share."""
    first_name, first = named[0]
    for name, x in named[1:]:
        if x.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"all hidden states must have the same leading dimensions:"
                f" {first_name} has {tuple(first.shape[:-1])}, {name} has {tuple(x.shape[:-1])}"
            )
    return first.shape[:-1]


def _check_tokens(name: str, x: Any, shape: torch.Size, device: torch.device, why: str) -> None:
    check_dense(name, x)
    if x.shape != shape:
        raise ValueError(
            f"{name} must have the leading shape of the hidden states, {tuple(shape)},"
            f" got {tuple(x.shape)}: {why}"
        )
    check_device(name, x, device)


def _token_mask(mask: Any, shape: torch.Size, device: torch.device) -> Tensor | None:
    """Return the mask as a flat bool tensor."""
    if mask is None:
        return None
    _check_tokens("mask", mask, shape, device, "all lens pairs share it, and it is not broadcast")
    if mask.is_complex():
        raise TypeError(f"mask must be bool or 0/1, got {mask.dtype}")
    if mask.dtype is not torch.bool:
        check_values("mask", (mask == 0) | (mask == 1), "may hold only 0 and 1")
    return mask.bool().reshape(-1)


def _token_labels(
    labels: Any, shape: torch.Size, device: torch.device, vocab_size: int, ignore_index: int
) -> Tensor:
    """Return the labels as a flat int64 tensor."""
    why = "labels[i] is the token that position i predicts"
    _check_tokens("labels", labels, shape, device, why)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    valid = (labels == ignore_index) | ((labels >= 0) & (labels < vocab_size))
    check_values("labels", valid, f"must be {ignore_index} or in [0, {vocab_size})")
    return labels.reshape(-1).long()


def check_values(name: str, valid: Tensor, requirement: str) -> None:
    """Check a condition on a tensor's values, without making the host wait for a GPU."""
    if torch.compiler.is_compiling() or valid.device.type in ("cuda", "meta"):
        compat.assert_on_device(valid.all(), f"{name} {requirement}")
    elif not bool(valid.all()):
        wrong = int((~valid).sum())
        raise ValueError(
            f"{name} {requirement}, but {wrong} of {valid.numel()} entries are invalid"
        )
