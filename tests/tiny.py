"""Tiny Hugging Face models and a tokenizer built from configs, without any download."""

from __future__ import annotations

from typing import Any

import torch


def model(kind: str = "llama", layers: int = 4, width: int = 16, vocab: int = 64, seed: int = 0):
    """Return a random model of a family; its norms are not the identity."""
    import transformers as hf

    common = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    attention = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
    }
    classes: dict[str, Any] = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
        "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
        "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel),
        "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM),
    }
    if kind == "gpt2":
        attention = {
            "n_embd": width,
            "n_layer": layers,
            "n_head": 2,
            "n_positions": 64,
            "initializer_range": 0.5,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    config_class, model_class = classes[kind]
    torch.manual_seed(seed)
    built = model_class(config_class(**common, **attention))
    for name, parameter in built.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "weight" in name else 0.0, std=0.2)
    return built.eval()


def tokenizer(vocab: int = 64):
    """Return a tokenizer that knows single characters."""
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
