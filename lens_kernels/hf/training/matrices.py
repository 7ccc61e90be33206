"""The trained matrices of the MSE loss, and their file beside the student's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

# The name of the student's submodule with the matrices.
PROJECTIONS = "mse_projections"


def new_matrices(student: Tensor, teacher: Tensor, pairs: int) -> nn.ModuleList:
    """Return a random matrix for each lens pair, with the hidden sizes of two heads' weights."""
    if not pairs:
        raise ValueError("mse_coeff needs at least one pair of layers, got none")
    sizes = teacher.shape[1], student.shape[1]
    matrices = nn.ModuleList(nn.Linear(*sizes, bias=False) for _ in range(pairs))
    # The matrices are never in float16, because Adam cannot train float16 weights.
    dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
    return matrices.to(student.device, dtype)


def mean_squares(
    matrices: nn.ModuleList, student_rows: list[Tensor], teacher_rows: list[Tensor]
) -> Tensor:
    """Return the mean over the pairs of ``sum_tokens mean (P h_teacher - h_student)^2``."""
    # Translators may follow the matrices.
    of_pairs = [*matrices.parameters()][: len(student_rows)]
    sums = [
        (nn.functional.linear(t.to(p.dtype), p) - s).float().square().mean(-1).sum()
        for p, s, t in zip(of_pairs, student_rows, teacher_rows, strict=True)
    ]
    return torch.stack(sums).mean()


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
