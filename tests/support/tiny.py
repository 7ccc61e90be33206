"""Tiny Hugging Face models and a tokenizer, built from configs without downloads."""

from __future__ import annotations

from typing import Any

import torch

KINDS = """cohere gemma2 gemma3 gemma3_text gpt2 gpt_neox granite llama mistral olmo2 opt phi phi3
qwen2 qwen3""".split()
EPS = 0.02  # a large eps, which visibly changes the result of a norm


def model(
    kind: str = "llama",
    layers: int = 4,
    width: int = 16,
    vocab: int = 64,
    seed: int = 0,
    **options: Any,
):
    """Return a tiny model with random weights, norms and biases.

    ``options`` are entries of its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": vocab,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        **_special(kind, layers, width),
        **options,
    }
    if kind == "gemma3":
        settings = _with_images(settings)
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    for name, parameter in built.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "weight" in name else 0.0, std=0.2)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return built.eval()


def _special(kind: str, layers: int, width: int) -> dict[str, Any]:
    inner = {"intermediate_size": 2 * width}
    heads = {"num_key_value_heads": 1}
    rms = {**inner, **heads, "rms_norm_eps": EPS, "head_dim": width // 2}
    layer = {**inner, "layer_norm_eps": EPS}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    mixed = {
        "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
        "sliding_window": 3,
    }
    capped = {**rms, **mixed, "final_logit_softcapping": 6.0}
    return {
        "llama": rms,
        "mistral": {**rms, "sliding_window": 3},
        "qwen2": {**rms, **mixed, "use_sliding_window": True},
        "qwen3": {**rms, **mixed, "use_sliding_window": True},
        "gemma2": capped,
        "gemma3_text": capped,
        "gemma3": capped,
        "phi": inner,
        "phi3": {**rms, "sliding_window": 3},
        "olmo2": rms,
        "granite": {**rms, "logits_scaling": 3.0, "residual_multiplier": 0.7},
        "cohere": {**layer, **heads, "logit_scale": 0.3},
        "gpt2": {**still, "layer_norm_epsilon": EPS},
        "gpt_neox": layer,
        "opt": {"ffn_dim": 2 * width, "init_std": 0.5, "dropout": 0.0},
    }[kind]


def _with_images(text: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a model that reads images. ``text`` is the config of its text part."""
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        # The id of the image token is outside the vocabulary, so that no text contains an image.
        "image_token_index": text["vocab_size"],
        "initializer_range": 0.5,
        "tie_word_embeddings": text.get("tie_word_embeddings", True),
    }


def tokenizer(vocab: int = 64):
    """Return a tokenizer that makes each character a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;_()="
    names = ["<s>", "</s>", *letters][:vocab]
    words = models.WordLevel({c: i for i, c in enumerate(names)}, unk_token="</s>")
    inner = Tokenizer(words)
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
