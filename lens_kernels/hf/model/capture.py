"""Collects a model's hidden states in a forward pass, without computing its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lens_kernels.hf.model.anatomy import blocks_of, decoder_of
from lens_kernels.hf.model.detection import decode
from lens_kernels.hf.model.tracing import hidden_of, hooked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def capture(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of the blocks ``layers`` (1 is the first) in a dict, by depth.

    Forward hooks on ``model`` collect the outputs, and are removed on exit. Unlike
    ``output_hidden_states=True``, this keeps only the depths in ``layers``.

    Raises:
        ValueError: The model has no lens, so its blocks are unknown.
        IndexError: A block does not exist.
    """
    captured: dict[int, Tensor] = {}
    blocks = blocks_of(model)

    def keep(depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object], output: object) -> None:
            states = hidden_of(output)
            # A block returns its hidden states alone or first, as detection has checked.
            assert states is not None
            captured[depth] = states

        return hook

    with hooked(blocks[depth - 1].register_forward_hook(keep(depth)) for depth in layers):
        yield captured


def hidden_states(
    model: PreTrainedModel, layers: Sequence[int], inputs: Mapping[str, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of ``layers``, and the normed final hidden state.

    The model's head does not run.
    """
    with capture(model, layers) as captured:
        final = hidden_of(decode(decoder_of(model), inputs))
    assert final is not None  # the decoder returns the normed final hidden state
    return [captured[depth] for depth in layers], final
