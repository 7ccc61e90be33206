"""The one gate: whatever a user passes is checked here, before any work, and becomes a LossCall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lens_kernels import compat
from lens_kernels.lens import LensHead
from lens_kernels.spec import check_grad_threshold, check_number

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORE_INDEX = -100
Hidden = Tensor | Sequence[Tensor]


def hidden_list(name: str, value: Any, allow_empty: bool = False) -> list[Tensor]:
    """Return hidden states as a list, each checked to be a dense floating-point tensor."""
    values = [value] if isinstance(value, Tensor) else value
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(value).__name__}")
    if not values and not allow_empty:
        raise ValueError(f"{name} is empty: pass one hidden state for each lens pair")
    return [
        hidden_state(name if isinstance(value, Tensor) else f"{name}[{i}]", x)
        for i, x in enumerate(values)
    ]


def hidden_state(name: str, x: Any) -> Tensor:
    """Return ``x``, checked to be a dense floating-point tensor ``(..., D)``."""
    check_float(name, x)
    if x.dim() < 2:
        raise ValueError(
            f"{name} must have shape (..., D) with at least one leading dimension,"
            f" got {tuple(x.shape)}"
        )
    return x


def check_float(name: str, x: Any) -> None:
    """Check that ``x`` is a dense tensor of a supported floating-point dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_dense(name, x)
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor: pass {name}.full_tensor(), gathered once before the call"
        )
    if x.dtype not in FLOATS:
        known = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(
            f"{name} must be floating point ({known}), got {str(x.dtype).removeprefix('torch.')}"
        )


def check_dense(name: str, x: Tensor) -> None:
    """Check that ``x`` has strides, as sparse and nested tensors do not."""
    if x.is_nested or x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one: convert it first")


def head(name: str, value: Any) -> LensHead:
    """Return a LensHead from a LensHead or a ``(V, D)`` weight, its tensors checked together."""
    if isinstance(value, Tensor):
        value = LensHead(value)
    if not isinstance(value, LensHead):
        raise TypeError(
            f"{name} must be a LensHead or a (V, D) tensor, got {type(value).__name__}"
            " (for a Hugging Face model: lens_kernels.hf.lens_head_from(model))"
        )
    weight = value.weight
    check_float(f"{name}.weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"{name}.weight must have shape (V, D), got {tuple(weight.shape)}"
            + (" (a partitioned parameter must be gathered first)" if weight.numel() == 0 else "")
        )
    vocab_size, width = weight.shape
    parts: list[tuple[str, Tensor | None, int]] = [("bias", value.bias, vocab_size)]
    if value.norm is not None:
        parts += [
            ("norm.weight", value.norm.weight, width),
            ("norm.bias", value.norm.bias, width),
        ]
    for part, x, size in parts:
        if x is None:
            continue
        check_float(f"{name}.{part}", x)
        if tuple(x.shape) != (size,):
            raise ValueError(
                f"{name}.{part} must have shape ({size},) to go with {name}.weight"
                f" {tuple(weight.shape)}, got {tuple(x.shape)}"
            )
        check_device(f"{name}.{part}", x, weight.device)
    return value


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Check that ``x`` is on ``device``."""
    if x.device != device:
        raise ValueError(
            f"{name} is on {x.device}, but the student head is on {device}: move it there"
        )


def check_side(
    name: str, hidden: Sequence[Tensor], head_name: str, lens_head: LensHead, autocast: bool
) -> None:
    """Check hidden states against the head that reads them."""
    weight = lens_head.weight
    for label, x in numbered(name, hidden):
        check_device(label, x, weight.device)
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{label} has width {x.shape[-1]}, but {head_name}.weight"
                f" {tuple(weight.shape)} reads width {weight.shape[1]}"
            )
        if x.dtype != weight.dtype and not autocast:
            raise TypeError(
                f"{label} is {x.dtype} but {head_name}.weight is {weight.dtype}:"
                " cast one of them, or run under torch.autocast"
            )


def numbered(name: str, hidden: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """Return hidden states with the names that messages call them by."""
    return [(name if len(hidden) == 1 else f"{name}[{i}]", x) for i, x in enumerate(hidden)]


def leading_shape(named: Sequence[tuple[str, Tensor]]) -> torch.Size:
    """Return the shape before the last dimension, equal for all hidden states."""
    first_name, first = named[0]
    for name, x in named[1:]:
        if x.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"all hidden states must have the same leading dimensions:"
                f" {first_name} has {tuple(first.shape[:-1])}, {name} has {tuple(x.shape[:-1])}"
            )
    return first.shape[:-1]


def token_mask(mask: Any, shape: torch.Size, device: torch.device) -> Tensor | None:
    """Return the mask as a flat bool tensor."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor of bool or 0/1, got {type(mask).__name__}")
    check_dense("mask", mask)
    if mask.is_complex():
        raise TypeError(f"mask must be bool or 0/1, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(
            f"mask must have the leading shape of the hidden states, {tuple(shape)},"
            f" got {tuple(mask.shape)}: it is shared by all lens pairs and never broadcast"
        )
    check_device("mask", mask, device)
    if mask.dtype is not torch.bool:
        check_values("mask", (mask == 0) | (mask == 1), "may hold only 0 and 1")
    return mask.bool().reshape(-1)


def token_labels(labels: Any, shape: torch.Size, device: torch.device, vocab_size: int) -> Tensor:
    """Return the labels as a flat int64 tensor."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an integer tensor, got {type(labels).__name__}")
    check_dense("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(
            f"labels must have the leading shape of the hidden states, {tuple(shape)},"
            f" got {tuple(labels.shape)}: labels[i] is the token that position i predicts"
        )
    check_device("labels", labels, device)
    valid = (labels == IGNORE_INDEX) | ((labels >= 0) & (labels < vocab_size))
    check_values("labels", valid, f"must be {IGNORE_INDEX} or in [0, {vocab_size})")
    return labels.reshape(-1).long()


def check_values(name: str, valid: Tensor, requirement: str) -> None:
    """Check a condition on the values of a tensor without making the host wait for a GPU."""
    if torch.compiler.is_compiling() or valid.device.type in ("cuda", "meta"):
        compat.assert_on_device(valid.all(), f"{name} {requirement}")
    elif not bool(valid.all()):
        wrong = int((~valid).sum())
        raise ValueError(f"{name} {requirement}, but {wrong} of {valid.numel()} entries do not")


def shared_vocabulary(vocab_size: Any, student: LensHead, teacher: LensHead) -> int:
    """Return the size of the vocabulary prefix over which both softmaxes are taken."""
    sizes = student.weight.shape[0], teacher.weight.shape[0]
    smaller = min(sizes)
    if vocab_size is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the vocabularies differ: student_head has {sizes[0]} entries, teacher_head has"
                f" {sizes[1]}. If the first {smaller} tokens are the same in both, pass"
                f" vocab_size={smaller}; both softmaxes are then taken over that prefix"
            )
        return smaller
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size={vocab_size} must lie in [1, {smaller}]: student_head has {sizes[0]}"
            f" entries, teacher_head has {sizes[1]}"
        )
    return vocab_size


def pair_weights(value: Any, pairs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the weights of the lens pairs in ``dtype``, ``1 / pairs`` by default."""
    if value is None:
        return torch.full((pairs,), 1.0 / max(1, pairs), dtype=dtype, device=device)
    if isinstance(value, Tensor):
        check_float("layer_weights", value)
        check_device("layer_weights", value, device)
        if value.shape != (pairs,):
            raise ValueError(
                f"layer_weights must have shape ({pairs},), one for each lens pair,"
                f" got {tuple(value.shape)}"
            )
        check_values("layer_weights", value.detach().isfinite(), "must be finite")
        return value.to(dtype)
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"layer_weights must be a list of numbers or a 1-D tensor, got {type(value).__name__}"
        )
    if len(value) != pairs:
        raise ValueError(
            f"layer_weights must have {pairs} entries, one for each lens pair, got {len(value)}"
        )
    for i, w in enumerate(value):
        check_number(f"layer_weights[{i}]", w, float("-inf"))
    return torch.tensor([float(w) for w in value], dtype=dtype, device=device)


def token_denominator(value: Any, device: torch.device) -> Tensor | float:
    """Return the denominator as a number above 0 or a one-element tensor."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"denominator must be a number or a tensor of one element,"
                f" got shape {tuple(value.shape)}"
            )
        if value.is_complex() or value.dtype is torch.bool:
            raise TypeError(f"denominator must be a real number, got {value.dtype}")
        if value.device.type != "cpu":
            check_device("denominator", value, device)
        check_values("denominator", value >= 0, "must be 0 or more")
        value = value.to(device).reshape(())
        # Zero tokens in the whole batch must give 0, as an all-masked call does.
        return torch.where(value == 0, 1, value)
    return check_number("denominator", value, 0.0)


def workspace(value: Any, device: torch.device) -> int:
    """Return the bytes that the tiles of logits may take."""
    if value is None:
        # CPU: 640 rows at 50k entries, enough for products at full speed. GPU: 1024 rows at 128k.
        return (256 if device.type == "cpu" else 1024) * 2**20
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"workspace_bytes must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"workspace_bytes must be positive, got {value}")
    return value


def threshold(value: Any, exact: bool) -> tuple[float | None, bool]:
    """Return the gradient threshold, and if it is relative; a backend that is exact takes none."""
    checked = check_grad_threshold(value)
    if exact and value is not None:
        raise ValueError(
            "grad_threshold is an approximation, and backend='reference' is exact: use one of them"
        )
    return checked
