"""Hidden states taken from a model as it runs, by hooks that are gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lens_kernels.hf.families import blocks_of, final_norm_of


@dataclass
class Captured:
    """What one forward pass left: block outputs by depth, and the normed final hidden state."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None


@contextmanager
def capture(model: Any, layers: Sequence[int]) -> Iterator[Captured]:
    """Capture the outputs of the blocks ``layers`` (1 is the first) and the final norm's.

    Holds only what was asked for, where ``output_hidden_states=True`` holds every depth. The hooks
    sit on this instance and are removed on leaving.
    """
    captured = Captured()
    blocks = blocks_of(model)

    def keep(depth: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            captured.hidden[depth] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_final(module: nn.Module, args: Any, output: Tensor) -> None:
        captured.final = output

    handles = [blocks[depth - 1].register_forward_hook(keep(depth)) for depth in layers]
    handles.append(final_norm_of(model).register_forward_hook(keep_final))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
