"""Loads models and tokenizers from disk, or from the Hub if downloads are allowed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)

from lens_kernels.failures import install
from lens_kernels.hf.model.adapter_base import base_of
from lens_kernels.hf.model.families import embedded_ids
from lens_kernels.hf.model.placement import check_placement, placed
from lens_kernels.hf.model.state import gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# The maximum number of blocks. transformers creates all blocks before it reads any weight.
MOST_BLOCKS = 10_000
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    path: str,
    dtype: str = "auto",
    download: bool = False,
    quantization: str | None = None,
    device_map: str | None = None,
) -> PreTrainedModel:
    """Return a causal language model, with its adapter if ``path`` holds one.

    Only safetensors files are read, and code in the model's repository is not run. Files, including
    those of an adapter's base model, are downloaded from the Hub only if ``download`` is True.
    ``quantization`` is ``"4bit"`` or ``"8bit"``: bitsandbytes quantises the linear layers except
    the head. ``device_map`` is a device, or a name such as ``"auto"``, by which accelerate spreads
    the blocks over all devices.

    Raises:
        ValueError: The model, dtype, quantisation or device does not exist, the model is not in
            safetensors, or its files do not have exactly the weights of the model.
        RuntimeError: A package is missing: peft for an adapter, bitsandbytes for quantisation.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_placement(quantization, device_map)
    local: dict[str, Any] = {"local_files_only": not download}
    options: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        **local,
        "use_safetensors": True,
        "trust_remote_code": False,
        "quantization": quantization,
        "device_map": device_map,
    }
    try:
        place = _place(path, download)
        adapter = find_adapter_config_file(place, **local)
        if adapter is None:
            return _load_plain(path, options)
        # An adapter without safetensors is refused, because peft would load a pickle.
        if not _has(place, ["adapter_model.safetensors"], local):
            raise ValueError(
                "the adapter has no adapter_model.safetensors; save it again with save_pretrained"
            )
        return _load_adapted(Path(adapter).parent.absolute(), options)
    except ModuleNotFoundError as error:
        name = error.name or str(error)
        raise RuntimeError(
            f"the model {path!r} needs the package {name}: {install(name)}"
        ) from error
    except Exception as error:  # libraries raise different errors for broken files of each format
        raise ValueError(_unreadable("model", path, error, download)) from error


def _load_plain(path: str, options: Mapping[str, Any]) -> PreTrainedModel:
    source = {name: options[name] for name in ("local_files_only", "revision") if name in options}
    place = _place(path, not options["local_files_only"], source.get("revision"))
    found, _ = PretrainedConfig.get_config_dict(place, **source)
    _check_config(found)
    arguments = placed(options, found)
    # A model without safetensors is refused, because transformers would ask a service on the Hub to
    # convert its pickles.
    if not _has(place, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), source):
        raise ValueError(
            f"the model has no {SAFE_WEIGHTS_NAME}: save it again with save_pretrained"
        )
    load = _auto_class(found.get("model_type")).from_pretrained
    model, info = load(place, **arguments, output_loading_info=True)
    model.config.name_or_path = model.name_or_path = path
    # transformers gives random values to missing weights, and only warns.
    _check_keys("lack weights of the model", path, info["missing_keys"])
    # Unexpected keys of a part that the model lacks, such as a reward head, are harmless. Others
    # are trained weights that the config leaves out.
    parts = tuple(f"{name}." for name, _ in model.named_children())
    others = [x for x in info["unexpected_keys"] if x.startswith(parts)]
    _check_keys("hold weights that the model does not use", path, others)
    _check_numbers(path, model)
    if "device_map" in arguments and not hasattr(model, "hf_device_map"):
        # Mark the model as placed, so that no code moves it. transformers does so only for several
        # devices.
        model.hf_device_map = {"": str(model.device)}
    return model


def _auto_class(kind: object) -> Any:
    """Return the class that loads a model type. Models that read images have their own class."""
    images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    if kind in images - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys():
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _load_adapted(folder: Path, options: Mapping[str, Any]) -> Any:
    # peft's AutoPeftModelForCausalLM would not report weights that are missing in the base model.
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    if config.task_type != "CAUSAL_LM":
        raise ValueError(f"the adapter's task_type must be CAUSAL_LM, got {config.task_type}")
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            "adapter_config.json has no base_model_name_or_path, because the base model was changed"
            " after loading and not saved. Save the base model, and write its folder there"
        )
    base = base_of(folder, base)
    model = _load_plain(base, {**options, "revision": config.revision})
    tokens = 0
    if (folder / "tokenizer_config.json").is_file():
        tokens = len(load_tokenizer(str(folder)))
    added = tokens > embedded_ids(model)
    if added:
        model.resize_token_embeddings(tokens)
    # Load the adapter for training, because peft freezes it by default. Then set eval mode, as for
    # other models.
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True).eval()
    # peft only warns about missing keys, and ignores unexpected keys. Loading the weights again
    # returns both.
    weights = load_peft_weights(str(folder), device=str(adapted.device))
    result: Any = set_peft_model_state_dict(adapted, weights)
    if added and not any(len(x) == tokens for x in weights.values()):
        raise ValueError(
            f"the adapter's tokenizer has {tokens} tokens, more than the embeddings of the base"
            f" model {base!r}, and the adapter holds no embeddings: save them with the adapter"
        )
    missing = [key for key in result.missing_keys if "default" in key.split(".")]
    _check_keys("lack weights of the adapter", str(folder), missing)
    _check_keys("hold weights that the model lacks", str(folder), result.unexpected_keys)
    _check_numbers(str(folder), adapted)
    return adapted


def _check_numbers(path: str, model: nn.Module) -> None:
    """Raise if a weight is NaN, because every result of the model would be NaN."""
    for name, x in model.named_parameters():
        # torch cannot compute the maximum of 8-bit floats
        wide = x.is_floating_point() and x.element_size() > 1
        with gathered([x] if wide else []):
            broken = bool(wide and x.numel() and x.detach().amax().isnan())
        if broken:
            raise ValueError(f"the files in {path!r} hold NaN in {name}: save the model again")


def _check_keys(what: str, path: str, keys: Iterable[str]) -> None:
    found = sorted(keys)
    if not found:
        return
    shown = ", ".join(map(repr, found[:3])) + (", ..." if found[3:] else "")
    raise ValueError(
        f"the files in {path!r} {what}: {len(found)} keys, {shown}. The config and the weights"
        " must describe the same model: save both again with save_pretrained, without wrappers"
        " such as torch.compile or DataParallel"
    )


def _check_config(config: Mapping[str, object]) -> None:
    """Refuse configs with too many blocks, and configs that name kernels on the Hub.

    transformers would run such a kernel's code.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_config(value)
        elif key in DEPTHS and isinstance(value, int) and value > MOST_BLOCKS:
            raise ValueError(f"config.json has {key}={value:.3g}; expected at most {MOST_BLOCKS}")
        elif key.strip("_").endswith(("_implementation", "_implementation_internal")):
            if isinstance(value, str) and ("/" in value or _is_absent(value)):
                raise ValueError(
                    f"config.json has {key}={value!r}, a kernel that is not installed, and code"
                    f" on the Hub is not run: remove {key} from the file"
                )


def _is_absent(kernel: str) -> bool:
    """Return whether a kernel's package is missing, so that transformers would ask the Hub."""
    if not kernel.removeprefix("paged|").startswith("flash_"):
        return False
    package = "flash_attn_interface" if kernel.endswith("_3") else "flash_attn"
    return importlib.util.find_spec(package) is None


def load_tokenizer(path: str, download: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, or of its base model if an adapter has none.

    Raises:
        ValueError: No tokenizer can be read.
    """
    local: dict[str, Any] = {"local_files_only": not download}
    try:
        source = place = _place(path, download)
        adapter = find_adapter_config_file(place, **local)
        if adapter is not None and not _has(place, [TOKENIZER_CONFIG_FILE], local):
            named = json.loads(Path(adapter).read_text("utf-8"))["base_model_name_or_path"]
            source = _place(base_of(Path(adapter).parent.absolute(), named), download)
        tokenizer = AutoTokenizer.from_pretrained(source, **local, trust_remote_code=False)
        tokenizer("a")  # some damaged configs raise an error only at a call
        return tokenizer
    except Exception as error:
        raise ValueError(_unreadable("tokenizer", path, error, download)) from error


def check_tokenizers(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    vocab_size: int | None = None,
    ids: Iterable[int] = (),
) -> None:
    """Check that both tokenizers give every token the same id.

    ``ids`` are the ids that occur in the data. With ``vocab_size``, only these tokens and the
    tokens with an id below ``vocab_size`` are compared.

    Raises:
        ValueError: Some ids differ. The message lists a few of these tokens.
    """
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    used = set(ids)
    differing = []  # Maps each token to compare to its lower id, and to whether the data has it.
    for name in mine.keys() | theirs.keys():
        own = {vocabulary[name] for vocabulary in (mine, theirs) if name in vocabulary}
        lowest, held = min(own), bool(own & used)
        compared = vocab_size is None or lowest < vocab_size or held
        if compared and mine.get(name) != theirs.get(name):
            differing.append((lowest, name, held))
    if not differing:
        return
    differing.sort()
    shown = ", ".join(
        f"{name!r} (student {mine.get(name)}, teacher {theirs.get(name)})"
        for _, name, _ in differing[:3]
    )
    first, hint = differing[0][0], "choose models with the same tokenizer"
    if vocab_size is not None and first >= vocab_size:
        hint = f"the data hold them, although vocab_size is {vocab_size}: leave these examples out"
    elif vocab_size is None and first and not any(held for _, _, held in differing):
        hint += f", or compare only the tokens before them, with vocab_size {first}"
    raise ValueError(
        f"student and teacher have different ids for {len(differing)} tokens: {shown}. Their"
        f" distributions cannot be compared: {hint}"
    )


def _place(path: str, download: bool, revision: str | None = None) -> str:
    """Return the folder or name from which a model is loaded.

    Without downloads, a name becomes its folder in the Hub's cache. With the name, huggingface_hub
    and transformers would ask the Hub even with ``local_files_only``.
    """
    if download or Path(path).is_dir():
        return path
    for name in (ADAPTER_CONFIG_NAME, CONFIG_NAME, TOKENIZER_CONFIG_FILE):
        found = try_to_load_from_cache(path, name, revision=revision)
        if isinstance(found, str):
            return str(Path(found).parent)
    raise OSError("neither a folder nor a model in the Hub's cache has this name")


def _has(path: str, names: Iterable[str], source: Mapping[str, object]) -> bool:
    """Return whether a model has at least one of the files."""
    for name in names:
        with contextlib.suppress(OSError):
            cached_file(path, name, **source)
            return True
    return False


def _unreadable(what: str, path: str, error: Exception, download: bool) -> str:
    hint = " or a name on the Hub" if download else ", or allow_download for a name on the Hub"
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return (
        f"the {what} {path!r} cannot be read: {reason}. Give the folder of a model in safetensors"
        f" with its tokenizer{hint}"
    )
