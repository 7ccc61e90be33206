"""The Hugging Face layer: lenses read off models, hidden states captured, a Trainer, a demo."""

from lens_kernels.hf.capture import capture
from lens_kernels.hf.config import LensDistillConfig
from lens_kernels.hf.families import Family, lens_head_from, register_family
from lens_kernels.hf.layers import uniform_layers
from lens_kernels.hf.objective import LensObjective
from lens_kernels.hf.trainer import LensDistillTrainer

__all__ = [
    "Family",
    "LensDistillConfig",
    "LensDistillTrainer",
    "LensObjective",
    "capture",
    "lens_head_from",
    "register_family",
    "uniform_layers",
]
