"""Tiny models of every type in transformers, with weights that make a wrong lens visible."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

VOCAB, WIDTH, LAYERS, EPS = 96, 32, 4, 0.02

# Patterns for names of config entries, with the size in a tiny model. The first match is used.
SIZES = (
    (r"n_group|topk_group|n_groups|num_group|mamba_n_groups|num_attention_chunks", 1),
    (r"num_nextn.*|.*mtp.*layers|num_kv_shared_layers", 0),
    (r".*_id|.*_token_index|num_logits_to_keep", None),
    (r"(mamba_|linear_.*)?(head_dim|d_head)|.*_head_dim|kv_channels|d_kv|rotary_dim", 8),
    (r"(mamba|ssm)_(n|num)_heads", 8),
    (r".*(expert|moe).*(ffn|intermediate|hidden).*size|.*expert.*dim", 24),
    (r".*per_tok.*|.*(top_k|topk|moe_k|num_selected_experts)", 2),
    (r".*(num_experts|n_routed_experts|num_local_experts|n_shared_experts|moe_num_experts)", 4),
    (r".*first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*(key_value_heads|kv_heads|key_value_groups)", 2),
    (r".*heads?", 4),
    (r".*vocab(ulary)?_size(_per_layer_input)?", VOCAB),
    (r".*(layers?|depth|num_blocks)", LAYERS),
    (r".*(rank|lora_r)", 16),
    (
        r".*(intermediate_(size|dim)|ffn_dim|ffn_.*size|d_ff|n_inner|dim_ff|feed_forward.*|mlp_dim|"
        r"proj_.*size|inner_dim|d_inner)",
        48,
    ),
    (
        r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|dim_model|emb_dim|"
        r"embed_size|embedding_dim|word_embed_proj_dim|lru_width|projection_dim|out_dim|dim|width)",
        WIDTH,
    ),
    (
        r".*(max_position_embeddings|n_positions|max_sequence_length|seq_length|max_seq_len|"
        r"n_ctx|context_length|max_source_positions|max_target_positions|original_max.*)",
        128,
    ),
    (r".*(d_state|ssm_state_size|state_size)", 8),
    (r".*image_size", 32),
    (r".*patch_size", 8),
    (r".*(sliding_window|attention_chunk_size|window_size|local_window.*|chunk_size)", 8),
    (r".*(pattern|interval)", 2),
)
# Entries that get the tiny size even if the default config has a smaller number.
FIXED = r"num_hidden_layers|n_layer|num_layers|n_layers"


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return config values with changes. Both may be nested."""
    inner = {
        name: _merged(values[name], change)
        for name, change in changes.items()
        if isinstance(change, dict) and isinstance(values.get(name), dict)
    }
    return {**values, **changes, **inner}


ROPE = {"rope_type": "default", "rope_theta": 1e4}


def _sections(*sizes: int) -> dict[str, Any]:
    """Return a text config with these sections of rotary dimensions."""
    return {"text_config": {"rope_parameters": {**ROPE, "mrope_section": list(sizes)}}}


MIXED = ["sliding_attention", "full_attention"] * 2
COMPASS = {"layer_types": MIXED, "rope_parameters": dict.fromkeys(MIXED, ROPE)}
SHARED = {  # The config entries of model types whose blocks share the weights of their attention.
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 2 * WIDTH,
    "attention_head_dim": 16,
}

# Further config changes, for types that do not work with the tiny sizes alone.
CHANGES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "cohere_compass_text": COMPASS,
    "cohere_compass": {"text_config": COMPASS},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "zamba": SHARED,
    "zamba2": {**SHARED, "hybrid_layer_ids": [1, 3], "mamba_headdim": 16},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4}},
    "ernie4_5_vl_moe": _sections(1, 1, 2),
    "granite4_vision": {"deepstack_layer_map": [], "qformer_config": {"num_attention_heads": 4}},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "hunyuan_vl": _merged(_sections(2, 1, 1), {"text_config": {"head_dim": 8}}),
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "dots3_note": {"adapter_input_size": WIDTH, "audio_config": {"adapter_input_size": WIDTH}},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "num_experts_per_tok": 2,
        }
    },
    "glm5_next": {"text_config": {"index_topk": 16, "index_kpool": 2}},
    **dict.fromkeys(("glm4v", "glm46v", "glm_ocr", "glmga"), _sections(2, 1, 1)),
    "glm4v_moe": _sections(1, 1, 0),
    **dict.fromkeys(("cosmos3_edge", "qwen2_vl", "qwen2_5_vl", "paddleocr_vl"), _sections(2, 1, 1)),
    "qwen2_5_omni_thinker": _sections(2, 1, 1),
    **dict.fromkeys(("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe"), {"head_dim": 8}),
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "dory": {
        "layer_types": MIXED,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "bailing_hybrid": {"num_expert_group": 1},
    "codegen": {"rotary_dim": 8},
}
NUMBERS = {
    "final_logit_softcapping": 2.0,
    "final_logit_softcap": 2.0,
    "logits_scaling": 3.0,
    "logit_scale": 0.3,
    "logits_scale": 0.3,
    "lm_head_multiplier": 0.3,
    "initializer_range": 0.3,
}


def config_of(kind: str, changes: dict[str, Any] | None = None) -> Any:
    """Return the config of a tiny model of a type."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    try:
        whole = cls()
    except Exception as error:
        raise ValueError(f"no default config: {error}") from error
    made = cls(**_merged(_shrunk(whole.to_dict()), {**CHANGES.get(kind, {}), **(changes or {})}))
    for config in (made, made.get_text_config()):
        if not hasattr(config, "pad_token_id"):  # some models of transformers 5.0 read pad_token_id
            config.pad_token_id = None
    return made


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    layers = {
        x
        for name, x in values.items()
        if type(x) is int and re.search(r"layers?$|depth$|num_blocks$", name)
    }
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name not in ("transformers_version", "architectures", "dtype", "per_layer_config"):
            small[name] = _entry(name, value, layers)
    if "kv_lora_rank" in small:  # Latent attention has no grouped key-value heads.
        small["num_key_value_heads"] = small.get("num_attention_heads", 4)
    if {"qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"} <= small.keys():
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
        if values.get("head_dim") == values["qk_head_dim"]:
            small["head_dim"] = small["qk_head_dim"]
    return small


def _entry(name: str, value: Any, layers: set[int]) -> Any:
    if name == "mrope_section":
        return [2, 1, 1]
    if isinstance(value, dict) and name.startswith("rope"):
        return {
            key: _entry(key, x, layers) if key == "mrope_section" else x for key, x in value.items()
        }
    if isinstance(value, dict):
        return _shrunk(value) if "config" in name or "model_type" in value else value
    if isinstance(value, (list, tuple)) and len(value) in layers and len(value) > LAYERS:
        return _cut(list(value))
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)) and name in NUMBERS:
        return NUMBERS[name]
    if isinstance(value, float):
        if "eps" in name and "init" not in name:
            return EPS
        return 0.0 if re.search(r"drop(out|_path|_rate)?|layerdrop|pdrop", name) else value
    if isinstance(value, int):
        if re.search(r"token_(id|index)$", name):
            return value % VOCAB if value >= 0 else value
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                if size is None or value <= 0:
                    return value
                return size if re.fullmatch(FIXED, name) else min(size, value)
    return value


def _cut(values: list[Any]) -> list[Any]:
    """Return ``LAYERS`` entries of a longer list, with as many different values as possible."""
    first = [i for i, x in enumerate(values) if x not in values[:i]][:LAYERS]
    rest = [i for i in range(len(values)) if i not in first]
    return [values[i] for i in sorted([*first, *rest[: LAYERS - len(first)]])]


def model_of(kind: str, group: str, changes: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """Return a tiny model of a type with random weights, norms and biases."""
    import transformers

    auto = {"causal": "AutoModelForCausalLM", "image-text": "AutoModelForImageTextToText"}[group]
    torch.manual_seed(seed)
    config, build = config_of(kind, changes), getattr(transformers, auto).from_config
    try:
        model = build(config)
    except AttributeError:  # older versions build a model of text alone from the text's config
        model = build(config.get_text_config())
    return randomised(model.float(), seed).eval()


@torch.no_grad()
def randomised(model: Any, seed: int) -> Any:
    """Fill parameters with random values.

    Random matrices keep the size of hidden states, and norms get noise.
    """
    torch.manual_seed(seed + 1)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() > 1:
            parameter.normal_(std=1.0 / math.sqrt(parameter.shape[-1]))
        else:
            parameter.nan_to_num_(0.0, 0.0, 0.0).add_(0.2 * torch.randn_like(parameter))
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear):
        head.weight.mul_(2.0)
    return model
