"""The ``reference`` backend: the dense oracle of ``reference/``, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from lens_kernels.call import LossCall


def rows(call: LossCall) -> Tensor:
    """Return the rows of the call, 0 where masked, in float64."""
    from reference import dense

    spec = call.spec
    tokens = call.row_weight.shape[1]
    every = torch.arange(tokens, device=call.row_weight.device)
    kept = every if call.mask is None else every[call.mask]
    values = dense.rows(
        [h[kept] for h in call.student_hidden],
        [h[kept].detach() for h in call.teacher_hidden],
        call.student_head,
        call.teacher_head,
        divergences=[d.value for d in spec.divergences],
        normed=spec.normed,
        beta=spec.beta,
        temperature=spec.temperature,
        vocab_size=spec.vocab_size,
        labels=None if call.labels is None else call.labels[kept],
    )
    return values.new_zeros(call.row_weight.shape).index_copy(1, kept, values)
