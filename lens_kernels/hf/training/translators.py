"""Files of translators, and the translators of both models in training.

Translators are stored in a safetensors file with ``layer_<depth>.weight`` and
``layer_<depth>.bias``, where depth 1 is the first block's output. The folder of a published tuned
lens, with ``params.pt``, can be read too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lens_kernels.lens import LensHead, LensTranslator

PUBLISHED = "params.pt"


def save_translators(path: Path, translators: Mapping[int, LensTranslator]) -> None:
    """Write ``translators``, whose keys are depths, to a safetensors file."""
    tensors = {
        f"layer_{depth}.{part}": getattr(x, part).detach().float().cpu().contiguous()
        for depth, x in translators.items()
        for part in ("weight", "bias")
    }
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial)
    partial.replace(path)


def load_translators(path: str | Path, device: Any = "cpu") -> dict[int, LensTranslator]:
    """Read translators by depth from a file of ``save_translators``, or from a published lens.

    A published lens is a folder with ``params.pt``, whose keys are ``<depth>.weight`` and
    ``<depth>.bias``. Depth 0 is the output of the embeddings. Pickled code is never run.

    Raises:
        ValueError: The file has neither format, or lacks the weight or the bias of a translator.
    """
    path = Path(path)
    if path.is_dir():
        file = path / PUBLISHED
        if not file.is_file():
            raise ValueError(f"{path} has no {PUBLISHED}: give a tuned lens, or a safetensors file")
        try:
            held = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises errors of many classes for damaged files
            reason = str(error).split(". ")[0]
            raise ValueError(f"{file} is no file of tensors that torch saved: {reason}") from error
        if not isinstance(held, Mapping):
            raise ValueError(f"{file} holds a {type(held).__name__}, not tensors by their names")
        tensors = {f"layer_{name}": x for name, x in held.items() if isinstance(x, Tensor)}
    else:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is no safetensors file of translators: {error}") from None
    parts: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        layer, _, part = name.partition(".")
        depth = layer.removeprefix("layer_")
        if not depth.isdecimal() or part not in ("weight", "bias"):
            raise ValueError(f"{path} holds {name!r}, which is no part of a translator")
        parts.setdefault(int(depth), {})[part] = x.float().to(device)
    if not parts or any(len(x) != 2 for x in parts.values()):
        raise ValueError(f"{path} lacks a weight or a bias of a translator")
    return {depth: LensTranslator(**parts[depth]) for depth in sorted(parts)}


def of_layers(name: str, path: str | None, layers: Sequence[int], head: LensHead) -> Any:
    """Return the translators of ``layers`` in a file, for hidden states of ``head``, or None.

    Errors call the file ``name``. Without a file, the result is None.

    Raises:
        ValueError: The file lacks a layer, or a translator has another width.
    """
    if path is None:
        return None
    device, width = head.weight.device, head.weight.shape[1]
    held = load_translators(path, device)
    missing = [depth for depth in layers if depth not in held]
    if missing:
        raise ValueError(
            f"{name}={path!r} has translators for layers {[*held]}, but not for {missing}: train"
            " them with lens-kernels tune-lens --layers, or compare other layers"
        )
    made = [held[depth] for depth in layers]
    for depth, each in zip(layers, made, strict=True):
        if len(each.bias) != width:
            raise ValueError(
                f"{name}={path!r} has width {len(each.bias)} in layer {depth}, but the hidden"
                f" states have width {width}: give the translators of this model"
            )
    return made


def trainable(made: Sequence[LensTranslator] | None, layers: int, head: LensHead) -> nn.ModuleList:
    """Return modules that start as the translators ``made``, or as zeros for ``layers`` layers.

    They are float32, because Adam cannot train 16-bit weights well.
    """
    width, device = head.weight.shape[1], head.weight.device
    modules = nn.ModuleList(nn.Linear(width, width, device=device) for _ in range(layers))
    for i, module in enumerate(modules):
        start = LensTranslator.zeros(width) if made is None else made[i]
        module.load_state_dict({"weight": start.weight, "bias": start.bias})
    return modules


def translated(made: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the rows of each layer after its translator. The last rows are final, and unchanged.

    Translators may be modules. None stands for no translators.
    """
    each = [LensTranslator(x.weight, x.bias) for x in made or ()]
    return [translator(x) for translator, x in zip(each, rows, strict=False)] + [*rows[len(each) :]]
