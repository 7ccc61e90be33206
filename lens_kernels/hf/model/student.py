"""Builds a student from some blocks of its teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lens_kernels.hf.model.anatomy import blocks_of, detect_lens
from lens_kernels.hf.model.families import causal_lm_of, class_name
from lens_kernels.hf.model.placement import moved
from lens_kernels.hf.model.state import evaluating, measured
from lens_kernels.hf.model.tracing import hidden_in, hooked, logits_of, sample_tokens

# The names that configs use for the number of blocks. Some of them belong to encoder-decoders.
LAYER_COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_layers")


def shallow_copy(teacher: Any, blocks: Sequence[int]) -> Any:
    """Return a copy of ``teacher`` that has only its blocks ``blocks`` (1 is the first).

    The copy has the teacher's dtypes and device, and is compared with the teacher on a few tokens.
    Its ``name_or_path`` is empty, because the teacher's files hold another model.

    Raises:
        ValueError: A block does not exist, or the blocks are not in ascending order. Or the copy's
            logits differ from those of the teacher without the other blocks.
        TypeError: The teacher has adapters or quantised layers.
    """
    lens = detect_lens(teacher)
    total = len(lens.indices)
    every = [*causal_lm_of(teacher).get_submodule(lens.blocks).children()]
    if lens.indices != tuple(range(len(every))):
        raise ValueError(f"some blocks in {lens.blocks!r} of {class_name(teacher)} do not run")
    for i in blocks:
        if not 1 <= i <= total:
            raise ValueError(f"blocks must lie in [1, {total}], got {i}")
    if not blocks or any(i >= j for i, j in pairwise(blocks)):
        raise ValueError(
            f"blocks must hold at least one block, in ascending order, got {list(blocks)}"
        )
    inner = causal_lm_of(teacher)
    config = copy.deepcopy(inner.config)
    config.name_or_path = ""
    text = config.get_text_config()
    for name in LAYER_COUNTS:
        if getattr(text, name, None) == total:
            setattr(text, name, len(blocks))
    for name, value in text.to_dict().items():
        # Lists with one entry for each block are shortened to the student's blocks. Lists of token
        # ids are kept, although one may have as many entries by chance.
        if isinstance(value, (list, tuple)) and len(value) == total and "token" not in name:
            setattr(text, name, [value[i - 1] for i in blocks])
    student = type(inner)(config)
    source, target = inner.state_dict(), student.state_dict()
    prefix = lens.blocks + "."
    for name, fresh in target.items():
        origin = name
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            origin = f"{prefix}{blocks[int(index)] - 1}.{rest}"
        found = source.get(origin)
        kinds = [(x.shape, x.is_floating_point()) for x in (found, fresh) if x is not None]
        if found is None or kinds[0] != kinds[1]:
            raise TypeError(
                f"teacher must hold plain floating-point weights, but {origin!r} is not one:"
                " merge its adapters (merge_and_unload) and dequantise it first. If it has neither,"
                " the kind of its blocks depends on their depth, and the copy has other kinds: keep"
                " the first blocks"
            )
        target[name] = found.clone()
    # load_state_dict with assign=True keeps the dtype of each weight. Casting the whole model would
    # also round buffers that checkpoints do not contain, such as rotary frequencies.
    student.load_state_dict(target, assign=True)
    student.tie_weights()
    moved(student, inner.device)
    if inner.generation_config is not None:
        student.generation_config = copy.deepcopy(inner.generation_config)
    if inner.device.type != "meta":
        _verify_copy(student, inner, blocks)
    return student


def _verify_copy(student: Any, teacher: Any, blocks: Sequence[int]) -> None:
    """Compare the copy's logits with the teacher's, while the teacher skips its other blocks."""

    def skip(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = hidden_in(args, kwargs)
        if isinstance(output, (tuple, list)):
            return type(output)([hidden, *output[1:]])
        return hidden

    tokens = sample_tokens(teacher)
    dropped = [x for depth, x in enumerate(blocks_of(teacher), start=1) if depth not in blocks]
    skipped = (block.register_forward_hook(skip, with_kwargs=True) for block in dropped)
    with hooked(skipped), evaluating(student):
        own, expected = measured(
            teacher, lambda: [logits_of(model, tokens).float() for model in (student, teacher)]
        )
    error, largest = (own - expected).abs().max(), expected.abs().max()
    # A teacher that was cast to 16 bits has rounded rotary frequencies, but the copy has exact
    # frequencies. So a larger difference is allowed.
    exact = all(x.itemsize >= 4 for x in teacher.parameters() if x.is_floating_point())
    if not error <= (1e-3 if exact else 5e-2) * largest:
        raise ValueError(
            f"blocks {list(blocks)} of {class_name(teacher)} make no student: its logits differ by"
            f" {error / largest:.1e} of the largest from the teacher's without the other blocks. A"
            " block computes different results at different depths (as with"
            " scale_attn_by_inverse_layer_idx in GPT-2): keep the first blocks, or pass a student"
            " of your own"
        )
