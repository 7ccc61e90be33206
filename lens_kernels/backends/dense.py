"""The ``reference`` backend: the dense fp64 oracle of ``reference/``, differentiated by autograd."""

from __future__ import annotations

from torch import Tensor

from lens_kernels.call import LossCall


def rows(call: LossCall) -> Tensor:
    """Return the rows of the call, 0 where masked, in float64."""
    from reference import dense

    spec = call.spec
    kept = slice(None) if call.mask is None else call.mask.nonzero()[:, 0]
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
    if call.mask is None:
        return values
    return values.new_zeros(call.row_weight.shape).index_copy(1, kept, values)
