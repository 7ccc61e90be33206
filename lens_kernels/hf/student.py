"""A student made of some of its teacher's blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from lens_kernels.hf.families import blocks_of


def shallow_copy(teacher: Any, blocks: Sequence[int]) -> Any:
    """Return a model of the teacher's blocks ``blocks`` (1 is the first) and all its other parts.

    Raises:
        ValueError: A block that the teacher does not have.
    """
    total = len(blocks_of(teacher))
    for i in blocks:
        if not 1 <= i <= total:
            raise ValueError(f"blocks must lie in [1, {total}], got {i}")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i - 1] for i in blocks]
    student = type(teacher)(config).to(teacher.dtype)
    source, target = teacher.state_dict(), student.state_dict()
    prefix = next(name for name, module in teacher.named_modules() if module is blocks_of(teacher))
    for name in target:
        origin = name
        if name.startswith(prefix + "."):
            index, _, rest = name[len(prefix) + 1 :].partition(".")
            origin = f"{prefix}.{blocks[int(index)] - 1}.{rest}"
        target[name] = source[origin].clone()
    student.load_state_dict(target)
    if teacher.generation_config is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student
