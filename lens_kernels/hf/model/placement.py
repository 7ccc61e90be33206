"""Options of loading a model: quantisation of its weights, and its devices."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import nn

from lens_kernels.failures import install

Moved = TypeVar("Moved", bound=nn.Module)

QUANTIZATIONS = ("4bit", "8bit")
# The names with which accelerate spreads a model's blocks over all devices.
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placement(quantization: str | None, device_map: str | None, prefix: str = "") -> None:
    """Check ``quantization`` and ``device_map``. Errors put ``prefix`` before these names.

    Raises:
        ValueError: A name is unknown, or a device does not exist.
        RuntimeError: ``quantization`` needs bitsandbytes, which is not installed.
    """
    if quantization is not None:
        if quantization not in QUANTIZATIONS:
            raise ValueError(
                f"{prefix}quantization must be {' or '.join(QUANTIZATIONS)}, got {quantization!r}"
            )
        if find_spec("bitsandbytes") is None:
            raise RuntimeError(
                f"{prefix}quantization={quantization} needs the package bitsandbytes:"
                f" {install('bitsandbytes')}"
            )
    if device_map is None or device_map in SPREADS:
        return
    try:
        if not torch.empty(0, device=device_map).is_meta:
            return
        reason = "the meta device holds no weights"
    # torch raises these errors for a missing device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
    raise ValueError(
        f"{prefix}device_map must be a device of this machine, such as cpu or cuda:0, or one of"
        f" {', '.join(SPREADS)}, got {device_map!r} ({reason})"
    )


def placed(options: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert loading options to arguments of ``from_pretrained`` for a model with this config.

    ``options`` may have ``quantization`` and ``device_map``, which ``check_placement`` has checked.

    Raises:
        ValueError: The model's files are quantised already.
    """
    arguments = {name: x for name, x in options.items() if x is not None}
    quantization = arguments.pop("quantization", None)
    if quantization is None:
        return arguments
    if "quantization_config" in config:
        kind = config["quantization_config"].get("quant_method", "a method of their own")
        raise ValueError(
            f"the model's files are quantised already, by {kind}: leave {quantization}"
            " quantisation out"
        )
    # imported here because the import is slow, and most models are not quantised
    from transformers import BitsAndBytesConfig

    dtype = options["dtype"]
    if dtype == "auto":
        own = {**config, **config.get("text_config", {})}
        dtype = getattr(torch, own.get("dtype") or own.get("torch_dtype") or "float32")
    # transformers does not quantise the head, because models are sensitive to its rounding errors.
    arguments["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,  # float32, the default, is slow
    )
    return arguments


def moved(model: Moved, device: torch.device | str) -> Moved:
    """Move a model to a device and return it. transformers refuses to move quantised models."""
    return model.to(device)
