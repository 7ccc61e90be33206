"""Build a student from some of its teacher's blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from lens_kernels.hf.model.families import blocks_of, causal_lm_of, family_of


def shallow_copy(teacher: Any, blocks: Sequence[int]) -> Any:
    """Return a copy of the teacher that has only its blocks ``blocks`` (1 is the first).

    Dtypes and device are the teacher's.

    Raises:
        ValueError: The teacher does not have one of the blocks.
        TypeError: The teacher has adapters or quantised layers.
    """
    total = len(blocks_of(teacher))
    for i in blocks:
        if not 1 <= i <= total:
            raise ValueError(f"blocks must lie in [1, {total}], got {i}")
    inner = causal_lm_of(teacher)
    config = copy.deepcopy(inner.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(blocks)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i - 1] for i in blocks]
    student = type(inner)(config)
    source, target = inner.state_dict(), student.state_dict()
    prefix = family_of(inner).blocks + "."
    for name, fresh in target.items():
        origin = name
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            origin = f"{prefix}{blocks[int(index)] - 1}.{rest}"
        found = source.get(origin)
        if found is None or found.shape != fresh.shape or not found.is_floating_point():
            raise TypeError(
                f"teacher must hold plain floating-point weights, and {origin!r} is not one:"
                " merge its adapters (merge_and_unload) and dequantise it first"
            )
        target[name] = found.clone()
    # assign=True keeps the dtype of each weight. Casting the whole model would round buffers that
    # are not in checkpoints, such as rotary frequencies.
    student.load_state_dict(target, assign=True)
    student.tie_weights()
    student.to(inner.device)
    if inner.generation_config is not None:
        student.generation_config = copy.deepcopy(inner.generation_config)
    return student
