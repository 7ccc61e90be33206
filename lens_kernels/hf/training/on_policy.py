"""On-policy batches: the student samples their answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from lens_kernels.hf.model.state import evaluating, generating
from lens_kernels.hf.training.collation import Collator
from lens_kernels.inputs import IGNORE_INDEX


@torch.no_grad()
def answered(
    student: Any, batch: Mapping[str, Tensor], pad: int, max_length: int
) -> dict[str, Tensor]:
    """Return a batch with the same prompts, and with answers that the student samples.

    A row's prompt is everything before its first label, and at least its first token, without
    tokens that ``attention_mask`` hides. Only the answer's tokens have labels. A row without labels
    stays without labels. An answer ends with the first end token of the student's generation
    config, or when prompt and answer have ``max_length`` tokens. Answers are sampled at temperature
    1. ``pad`` is the padding id.
    """
    if "position_ids" in batch:
        raise ValueError(
            "on_policy does not support position_ids, because sampled answers have none: remove"
            " this column from the data"
        )
    labelled = batch["labels"] != IGNORE_INDEX
    first = labelled.int().argmax(-1).clamp(min=1).tolist()
    seen = batch.get("attention_mask", torch.ones_like(labelled)).bool()
    rows = zip(batch["input_ids"], seen, first, strict=True)
    prompts = [ids[:n][shown[:n]] for ids, shown, n in rows]
    width = max(map(len, prompts))
    ones = [torch.ones_like(x) for x in prompts]
    left = {
        "input_ids": pad_sequence(prompts, True, pad, padding_side="left"),
        "attention_mask": pad_sequence(ones, True, 0, padding_side="left"),
    }
    ends = student.generation_config.eos_token_id
    # The default temperature and top_p are 1, but the default of top_k is 50.
    sampling = GenerationConfig(
        do_sample=True, top_k=0, eos_token_id=ends, pad_token_id=pad,
        max_new_tokens=max(1, max_length - width),
    )  # fmt: skip
    with evaluating(student), generating(student, sampling):
        whole = student.generate(**left)
    ends = torch.tensor([ends] if isinstance(ends, int) else ends or [], device=whole.device)
    examples = []
    for prompt, answer, counts in zip(prompts, whole[:, width:], labelled.any(-1), strict=True):
        found = torch.isin(answer, ends).nonzero()
        answer = answer[: int(found[0]) + 1] if len(found) else answer
        targets = answer if counts else torch.full_like(answer, IGNORE_INDEX)
        labels = torch.cat([torch.full_like(prompt, IGNORE_INDEX), targets])
        examples.append({"input_ids": torch.cat([prompt, answer]), "labels": labels})
    batch = Collator(pad)(examples)
    return {name: x.to(whole.device) for name, x in batch.items()}
