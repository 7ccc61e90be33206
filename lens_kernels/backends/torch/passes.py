"""The interface of the pass, which turns a tile of logits into losses and logit gradients.

The modules ``pointwise_pass`` and ``row_kernel_pass`` implement it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lens_kernels.backends.head_products import Survey
from lens_kernels.backends.torch.layout import Layout
from lens_kernels.options import Divergence
from lens_kernels.targets import TargetRows


class Terms(NamedTuple):
    """The loss terms of a tile's rows, and the weight of each row, ``(R,)``.

    There is a divergence from the teacher, or a cross entropy of labels at temperature 1, or both.
    """

    divergence: Divergence | None
    weight: Tensor | None
    labels: Tensor | None
    label_weight: Tensor | None
    # For each row ``z`` of the teacher's logits, ``(maximum, log sum exp(z - maximum))``, if known.
    teacher_statistics: Tensor | None = None
    # Sparse targets, which replace the teacher in the divergence, or None if there is a teacher.
    targets: TargetRows | None = None
    standardized: bool = False


class Pass(Protocol):
    """A pass for the heads and options of one call."""

    layout: Layout

    def survey(self) -> Survey:
        """Return empty statistics of gradients, which ``run`` can fill."""

    def run(
        self, tiles: list[Tensor], terms: Terms, grad: Tensor | None, survey: Any
    ) -> list[Tensor]:
        """Return a list with the divergence, the cross entropy, or both, of each row.

        If the call has ``reports``, each row's log-sum-exp and entropy follow the cross entropy.

        ``tiles`` are the products ``hidden @ weight.T``, ``(R, V)``, of the student and, with a
        divergence, of the teacher. The gradient of the weighted sum of the results with respect to
        the student's products is written to ``grad`` ``(R, V)``, unless it is None. ``grad`` is
        the student's tile itself if ``layout.grad_stride`` is None. ``survey`` is None or a result
        of ``survey()``.
        """
