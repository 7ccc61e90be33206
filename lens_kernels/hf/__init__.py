"""Everything for Hugging Face models: lens heads, hidden states, training, evaluation and a demo.

Names are imported at their first use, because importing the Trainer is slow.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_kernels.hf.inspection.inspect import inspect_lens
    from lens_kernels.hf.model.anatomy import detect_lens, lens_head_from
    from lens_kernels.hf.model.capture import capture
    from lens_kernels.hf.model.families import Family, register_family
    from lens_kernels.hf.model.layers import uniform_layers
    from lens_kernels.hf.model.student import shallow_copy
    from lens_kernels.hf.training.config import LensDistillConfig
    from lens_kernels.hf.training.objective import LensObjective
    from lens_kernels.hf.training.trainer import LensDistillTrainer

__all__ = [
    "Family",
    "LensDistillConfig",
    "LensDistillTrainer",
    "LensObjective",
    "capture",
    "detect_lens",
    "inspect_lens",
    "lens_head_from",
    "register_family",
    "shallow_copy",
    "uniform_layers",
]

_MODULES = {
    "inspection.inspect": ("inspect_lens",),
    "model.anatomy": ("detect_lens", "lens_head_from"),
    "model.capture": ("capture",),
    "model.families": ("Family", "register_family"),
    "model.layers": ("uniform_layers",),
    "model.student": ("shallow_copy",),
    "training.config": ("LensDistillConfig",),
    "training.objective": ("LensObjective",),
    "training.trainer": ("LensDistillTrainer",),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
