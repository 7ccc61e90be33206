"""Saves the base model of an adapter beside the adapter, if no other files hold it.

An adapter's files name the folder of its base model. If the base was changed after loading, like a
shallow copy, no folder holds it. Programs would then load the adapter onto a wrong model.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from lens_kernels import compat

FOLDER = "base_model"
# The parts that adapters insert into the names of the base model's weights.
INSERTED = ("base_layer", "original_module")


def is_saved(model: Any) -> bool:
    """Return whether files already hold the base model of ``model``, which has adapters."""
    name = next(iter(model.peft_config.values())).base_model_name_or_path
    if not name:
        return False
    try:
        found = AutoConfig.from_pretrained(name, local_files_only=True).get_text_config()
    except (OSError, ValueError):
        # a relative name is a model on the Hub, which has its files
        return not Path(name).is_absolute()
    own = model.get_base_model().config.get_text_config()
    return bool(found.num_hidden_layers == own.num_hidden_layers)


def save_base(model: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the base of an adapted model, whose state dict is ``state``, to a folder.

    Raises:
        ValueError: ``state`` lacks weights of the base.
    """
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    # the copy is used only for the names of its weights and for its method that saves
    with torch.device("meta"):
        plain = compat.class_before_sharding(base)(config).to(base.dtype)
    plain.generation_config = base.generation_config
    names = plain.state_dict().keys()
    weights = {}
    for name, value in state.items():
        parts = name.removeprefix("base_model.model.").split(".")
        original = ".".join(part for part in parts if part not in INSERTED)
        if original in names:
            weights[original] = value
    if missing := sorted(names - weights.keys()):
        raise ValueError(
            f"the base of the adapter cannot be saved, because its weight {missing[0]} was not"
            " found: save the base before adapters are added, and load it from there"
        )
    partial = folder.with_name(f"{folder.name}.partial")
    plain.save_pretrained(partial, state_dict=weights)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def base_of(adapter: Path, name: str) -> str:
    """Return the folder or Hub name of an adapter's base model, called ``name`` in its config.

    If the base was saved beside the adapter, it is found even after the folder was moved.
    """
    if Path(name).name == FOLDER:
        for beside in (adapter / FOLDER, adapter.parent / FOLDER):
            if beside.is_dir():
                return str(beside)
    return name
