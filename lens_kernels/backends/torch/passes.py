"""What the pass over a tile of logits is, whatever makes it: losses, and the gradient of products.

``pointwise_pass`` and ``row_kernel_pass`` implement it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lens_kernels.backends.head_products import Survey
from lens_kernels.backends.torch.layout import Layout
from lens_kernels.options import Divergence


class Terms(NamedTuple):
    """What rows of a tile are compared with, and the weight of each, ``(R,)``.

    There is a divergence, or the cross entropy of labels at temperature 1, or both.
    """

    divergence: Divergence | None
    weight: Tensor | None
    labels: Tensor | None
    label_weight: Tensor | None


class Pass(Protocol):
    """The pass, for the heads and options of one call."""

    layout: Layout

    def survey(self) -> Survey:
        """Return an empty survey of gradients, to be filled by ``run``."""

    def run(
        self, tiles: list[Tensor], terms: Terms, grad: Tensor | None, survey: Any
    ) -> list[Tensor]:
        """Return the divergence and the cross entropy of each row, those of the two that exist.

        ``tiles`` are the products ``(R, V)`` of the student and, with a divergence, the teacher.
        ``grad`` ``(R, V)`` takes the gradient of the weighted sum of the results with respect to
        the student's. It is the student's tile itself if the layout says so. ``survey`` is None or
        one of this pass.
        """
