"""Trains tuned lenses: one translator for each layer, which predicts the model's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens_kernels.functional import symmetric_lens_loss
from lens_kernels.hf.model.anatomy import blocks_of, lens_head_from
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.layers import check_layers
from lens_kernels.hf.model.loading import load_model, load_tokenizer
from lens_kernels.hf.model.placement import moved
from lens_kernels.hf.training.checks import Limits, check_data
from lens_kernels.hf.training.collation import Collator, padding_id
from lens_kernels.hf.training.data import load_examples
from lens_kernels.hf.training.files import check_download
from lens_kernels.hf.training.translators import save_translators
from lens_kernels.inputs import IGNORE_INDEX
from lens_kernels.lens import LensHead, LensTranslator
from lens_kernels.options import check_count, check_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_translators(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    layers: Sequence[int],
    steps: int,
    learning_rate: float,
    say: Callable[[str], None],
) -> tuple[dict[int, LensTranslator], dict[int, tuple[float, float]]]:
    """Train a translator for each layer, so that its lens predicts the model's own output.

    The loss is the forward KL from the model's output to each lens, as a mean over the tokens that
    predict a label. The model is frozen. Return the translators by depth, and each layer's mean
    divergence over all batches, before and after training.
    """
    model.requires_grad_(False).eval()
    head = lens_head_from(model)
    device, width = head.weight.device, head.weight.shape[1]
    made = {depth: LensTranslator.zeros(width, device=device) for depth in layers}
    tensors = [x.requires_grad_() for each in made.values() for x in (each.weight, each.bias)]
    optimizer = torch.optim.Adam(tensors, lr=learning_rate)
    final_head = LensHead(head.weight, head.bias, scale=head.scale, softcap=head.softcap)
    lens = LensHead(head.weight, head.bias, head.norm, head.scale, head.softcap, [*made.values()])

    def losses(batch: Mapping[str, Tensor], reduction: str) -> Tensor:
        inputs = {name: x.to(device) for name, x in batch.items()}
        labels = inputs.pop("labels")
        counted = torch.zeros_like(labels, dtype=torch.bool)
        counted[..., :-1] = labels[..., 1:] != IGNORE_INDEX
        with torch.no_grad():
            hidden, final = hidden_states(model, layers, inputs)
        return symmetric_lens_loss(
            hidden, [final] * len(layers), lens, final_head, mask=counted,
            divergence="forward_kl", reduction=reduction,
        )  # fmt: skip

    def divergences() -> list[float]:
        with torch.no_grad():
            rows = torch.cat([losses(x, "none").flatten(1) for x in batches], 1)
        total = sum(int((x["labels"][..., 1:] != IGNORE_INDEX).sum()) for x in batches)
        return [float(x) for x in rows.sum(1) / max(1, total)]

    before = divergences()
    for step in range(steps):
        optimizer.zero_grad()
        loss = losses(batches[step % len(batches)], "mean")
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            say(f"step {step + 1} of {steps}: forward KL {loss.item():.4f} nats")
    after = divergences()
    return made, dict(zip(made, zip(before, after, strict=True), strict=True))


def tune_lens(
    model: str,
    data: str,
    output: Path,
    *,
    layers: Sequence[int] | None = None,
    steps: int = 250,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    prompt_style: str = "alpaca",
    max_length: int = 512,
    max_prompt_length: int = 256,
    dtype: str = "float32",
    allow_download: bool = False,
    say: Callable[[str], None],
) -> None:
    """Train a tuned lens: translators with which a model's layers predict its own output.

    Args:
        model: Folder or Hub name of the model.
        data: Data to train on, as for lens-kernels train.
        output: Safetensors file for the translators.
        layers: Layers to train translators for; 1 is the first block's output. By default all
            layers but the last.
        steps: Number of optimiser steps.
        learning_rate: Learning rate of Adam.
        batch_size: Examples in a step.
        prompt_style: Format of prompts, as for lens-kernels train.
        max_length: Maximum tokens per example, as for lens-kernels train.
        max_prompt_length: Maximum tokens per prompt, as for lens-kernels train.
        dtype: Dtype of the model's weights.
        allow_download: Allow downloads from the Hugging Face Hub.
        say: Called with each line of progress.

    Raises:
        ValueError: A layer does not exist, or an option or the data are invalid.
    """
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    check_number("learning_rate", learning_rate, 0.0)
    if output.is_dir():
        raise ValueError(f"output={str(output)!r} is a folder: give the name of a file")
    if layers and len({*layers}) < len(layers):
        raise ValueError(f"layers must differ, got {[*layers]}")
    check_download(data, allow_download)
    tokenizer = load_tokenizer(model, allow_download)
    examples = load_examples(
        data,
        tokenizer,
        prompt_style=prompt_style,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
    )
    loaded = load_model(model, dtype, allow_download)
    moved(loaded, "cuda" if torch.cuda.is_available() else "cpu")
    blocks = len(blocks_of(loaded))
    depths = check_layers("layers", [*(layers or range(1, blocks))], blocks)
    if not depths:
        raise ValueError(f"{model} has one block, and no layer before it that a lens could read")
    collate = Collator(padding_id(tokenizer))
    check_data(data, examples, Limits.of([loaded], None), collate)
    rows = [examples[i] for i in range(len(examples))]
    batches = [collate(rows[x : x + batch_size]) for x in range(0, len(rows), batch_size)]
    made, changes = train_translators(loaded, batches, depths, steps, learning_rate, say)
    if not all(x.isfinite().all() for each in made.values() for x in (each.weight, each.bias)):
        raise ValueError(
            f"the translators are not finite after {steps} steps, so they are not saved: lower"
            f" learning_rate={learning_rate:g}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    save_translators(output, made)
    for depth, (before, after) in changes.items():
        say(f"layer {depth}: forward KL {before:.4f} before, {after:.4f} after")
    say(f"translators: {output}")
