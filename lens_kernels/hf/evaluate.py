"""The objective's parts on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lens_kernels.hf.objective import LensObjective


@torch.no_grad()
def evaluate(objective: LensObjective, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return cross entropy, final divergence and each pair's divergence, in nats per token.

    Keys are ``ce``, ``kd`` and ``lens_<student depth>``.
    """
    student: Any = objective.student
    training = student.training
    student.eval()
    sums: dict[str, float] = {}
    tokens = 0.0
    for batch in batches:
        output = objective(batch)
        assert output.ce is not None
        parts = {"ce": output.ce, "kd": output.kd}
        depths = objective.student_layers
        parts |= {f"lens_{i}": x for i, x in zip(depths, output.per_layer, strict=True)}
        count = output.num_tokens.item()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.item() * count
        tokens += count
    student.train(training)
    if tokens == 0:
        raise ValueError("nothing to evaluate on: the batches hold no labelled token")
    return {name: value / tokens for name, value in sums.items()}
