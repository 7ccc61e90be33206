"""Distil language models through the logit lens, without holding all logits in memory."""

from lens_kernels.cost import Plan
from lens_kernels.cross_entropy import linear_cross_entropy
from lens_kernels.dispatch import plan
from lens_kernels.functional import (
    DistillationOutput,
    distillation_loss,
    symmetric_lens_loss,
)
from lens_kernels.lens import LensHead, LensNorm, LensTranslator
from lens_kernels.modules import DistillationLoss, SymmetricLensLoss
from lens_kernels.targets import SparseTargets
from lens_kernels.version import __version__

__all__ = [
    "__version__",
    "DistillationLoss",
    "DistillationOutput",
    "LensHead",
    "LensNorm",
    "LensTranslator",
    "Plan",
    "SparseTargets",
    "SymmetricLensLoss",
    "distillation_loss",
    "linear_cross_entropy",
    "plan",
    "symmetric_lens_loss",
]
