"""Capture a model's hidden states in a forward pass, without its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lens_kernels.hf.model.families import blocks_of, decoder_of


@contextmanager
def capture(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of the blocks ``layers`` (1 is the first) in a dict, by depth.

    Forward hooks on ``model`` collect the outputs, and are removed on exit. Only these depths are
    kept, whereas ``output_hidden_states=True`` would keep every depth.
    """
    captured: dict[int, Tensor] = {}
    blocks = blocks_of(model)

    def keep(depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            captured[depth] = output[0] if isinstance(output, tuple) else output

        return hook

    handles: list[Any] = []
    try:
        handles.extend(blocks[depth - 1].register_forward_hook(keep(depth)) for depth in layers)
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def hidden_states(
    model: Any, layers: Sequence[int], inputs: Mapping[str, Any]
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of ``layers`` and the normed final hidden state. The head is not run."""
    with capture(model, layers) as captured:
        final = decoder_of(model)(**inputs, use_cache=False).last_hidden_state
    return [captured[depth] for depth in layers], final


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace ``module.forward`` by ``forward`` inside the context.

    Data-parallel wrappers prepare gradients and gather parameters when the module is called. So
    code that uses the parameters must run inside that call.
    """
    # accelerate sets its own forward on the instance for autocast. It must be restored.
    before = vars(module).get("forward")
    try:
        module.forward = forward
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before
