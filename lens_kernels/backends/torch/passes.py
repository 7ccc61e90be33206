"""The interface of a pass: a function that turns a tile of logits into losses and gradients.

``pointwise_pass`` implements it in torch, and ``row_kernel_pass`` by a Triton kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lens_kernels.backends.head_products import GradientStatistics
from lens_kernels.backends.torch.layout import Layout
from lens_kernels.options import Divergence
from lens_kernels.targets import TargetRows


class Terms(NamedTuple):
    """The loss terms of a tile's rows, each with the weights of the rows, ``(R,)``.

    A term is a divergence from the teacher, or the cross entropy of labels at temperature 1.
    """

    divergence: Divergence | None
    weight: Tensor | None
    labels: Tensor | None
    label_weight: Tensor | None
    # The teacher's ``(maximum, log sum exp(z - maximum))`` of each row of logits ``z``, if known.
    teacher_statistics: Tensor | None = None
    # The sparse targets that replace the teacher's logits, or None.
    targets: TargetRows | None = None
    standardized: bool = False
    # The index of the teacher's head in the call.
    teacher: int = 0


class Pass(Protocol):
    """A pass for the heads and options of one call."""

    layout: Layout

    def grad_stats(self) -> GradientStatistics:
        """Return empty statistics of logit gradients, for ``run`` to fill."""

    def run(
        self, tiles: list[Tensor], terms: Terms, grad: Tensor | None, grad_stats: Any
    ) -> list[Tensor]:
        """Return the losses of each row: the divergence and the cross entropy, if requested.

        If the call has ``reports``, each row's log-sum-exp and entropy follow.

        ``tiles`` are the products ``hidden @ weight.T``, ``(R, V)``, of the student and, with a
        divergence, of the teacher. The gradient of the weighted losses with respect to the
        student's products is written to ``grad`` ``(R, V)``, unless ``grad`` is None. ``grad`` is
        the student's tile itself if ``layout.grad_stride`` is None. If ``grad_stats`` is given, it
        collects statistics of the gradient.
        """
