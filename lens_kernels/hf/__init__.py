"""The Hugging Face layer: lenses read off models, hidden states captured, a Trainer, a demo."""

from lens_kernels.hf.capture import capture
from lens_kernels.hf.families import lens_head_from
from lens_kernels.hf.layers import uniform_layers
from lens_kernels.hf.objective import LensObjective
from lens_kernels.hf.trainer import LensDistillConfig, LensDistillTrainer

__all__ = [
    "LensDistillConfig",
    "LensDistillTrainer",
    "LensObjective",
    "capture",
    "lens_head_from",
    "uniform_layers",
]
