"""The objective's parts on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lens_kernels.hf.meter import Meter
from lens_kernels.hf.objective import LensObjective


@torch.no_grad()
def evaluate(objective: LensObjective, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the means over tokens of all that ``Outcome.sums`` has, in nats per token."""
    student: Any = objective.student
    training = student.training
    student.eval()
    meter = Meter()
    for batch in batches:
        meter.add(objective(batch))
    student.train(training)
    means = meter.means()
    if not means:
        raise ValueError("nothing to evaluate on: the batches hold no labelled token")
    return means
