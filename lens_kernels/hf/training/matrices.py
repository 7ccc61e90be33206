"""Reads and writes the file of the MSE loss's trained matrices, beside the student's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from lens_kernels.hf.training.objective import PROJECTIONS


def save(matrices: Mapping[str, Tensor], folder: Path) -> None:
    """Write the matrices to a file in ``folder``. An interrupt never leaves a partial file."""
    partial = folder / f"{PROJECTIONS}.partial"
    save_file(dict(matrices), partial)
    partial.replace(folder / f"{PROJECTIONS}.safetensors")


def load(projections: nn.Module, folder: Path) -> None:
    """Load the matrices of the file in ``folder`` into ``projections``.

    Raises:
        ValueError: The file is missing or damaged.
    """
    file = folder / f"{PROJECTIONS}.safetensors"
    try:
        learnt = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    # FSDP may have sharded the matrices, so set_model_state_dict gives each process its part of
    # them.
    set_model_state_dict(projections, dict(learnt), options=StateDictOptions(full_state_dict=True))
