"""Generate answers to prompts: greedily, or sampled independently of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lens_kernels.hf.model.state import evaluating, generating
from lens_kernels.hf.training.data import check_count, padding_id
from lens_kernels.options import check_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    no_repeat_ngram_size: int = 0,
    progress: bool = False,
) -> list[str]:
    """Return the model's answer to each prompt, in the order of the prompts.

    Each prompt has its own random numbers, which depend on ``seed`` and the prompt's position. They
    do not depend on the batch size, and torch's global generators are not used. But other batch
    shapes, devices or versions round logits differently, which can change the choice between two
    tokens of nearly equal score.

    The model's saved generation settings are ignored, except its end-of-text tokens.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, not padded.
        seed: Seed of the random numbers. Greedy decoding does not use it.
        max_new_tokens: Maximum number of tokens in an answer.
        batch_size: Number of prompts in a batch.
        do_sample: Sample answers. Otherwise decode greedily.
        temperature: Divides the logits before sampling.
        top_p: Sample from the most likely tokens whose probabilities add up to this share.
        top_k: Sample from this number of most likely tokens; 0 for all.
        no_repeat_ngram_size: No n-gram of this size occurs twice in prompt and answer. 0 allows
            repetition. The paper uses 6.
        progress: Show a progress bar.
    """
    check_sampling(
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        no_repeat_ngram_size=no_repeat_ngram_size,
    )
    check_lengths(model, prompts, max_new_tokens)

    pad = padding_id(tokenizer)
    stops = _stop_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        # _RowSampler adds noise to the scores, so that the token with the highest score is a sample
        do_sample=False,
        no_repeat_ngram_size=no_repeat_ngram_size,
        eos_token_id=stops,
        pad_token_id=pad,
        use_cache=True,
    )
    warpers: list[LogitsProcessor] = []
    if do_sample:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []
    source = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (len(prompts),), generator=source).tolist()

    answers = [""] * len(prompts)
    # Prompts of similar length share a batch, because they need little padding. The longest prompts
    # come first, so that a lack of memory shows at once.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    with evaluating(model), generating(model, config):
        for chunk in chunks(order, batch_size, progress, "generating"):
            processors = LogitsProcessorList(warpers)
            if do_sample:
                processors.append(_RowSampler([seeds[i] for i in chunk], model.device))
            ids, mask = _pad_left([prompts[i] for i in chunk], pad, model.device)
            tokens = model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors)
            for i, row in zip(chunk, tokens[:, ids.shape[1] :].tolist(), strict=True):
                end = next((k for k, token in enumerate(row) if token in stops), len(row))
                answers[i] = tokenizer.decode(row[:end], skip_special_tokens=True)
    return answers


class _RowSampler(LogitsProcessor):
    """Adds Gumbel noise to the scores, so that the highest score of each row is a sample.

    Each row has its own random generator. torch.multinomial draws for the whole batch, so a row's
    sample would depend on the other rows.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = model.generation_config.eos_token_id
    found = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
    return sorted(i for i in found if i is not None)


def _pad_left(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    # The mask is computed from lengths, because a prompt may contain the padding id as a real
    # token.
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def check_sampling(
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float,
    top_p: float,
    top_k: int,
    no_repeat_ngram_size: int,
) -> None:
    """Check the arguments of ``generate`` that do not depend on the model."""
    check_count("max_new_tokens", max_new_tokens, 1)
    check_count("batch_size", batch_size, 1)
    check_count("top_k", top_k, 0)
    check_count("no_repeat_ngram_size", no_repeat_ngram_size, 0)
    if no_repeat_ngram_size == 1:
        raise ValueError(
            "no_repeat_ngram_size must be 0 or at least 2, got 1: with 1, an answer could not"
            " repeat a token or use a token of the prompt"
        )
    hint = "; for greedy decoding use do_sample=False"
    check_number("temperature", temperature, 0.0, hint=hint)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}; 1 samples from all tokens")


def check_lengths(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Raise if the longest prompt and ``new`` more tokens exceed the model's positions."""
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{i}] must hold at least one token, got none")
    longest = max(map(len, prompts), default=0)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest + new > limit:
        raise ValueError(
            f"the model has {limit} positions, but the longest prompt has {longest} tokens and an"
            f" answer up to max_new_tokens={new}: set max_new_tokens to {limit - longest} or less"
            if longest < limit
            else f"the model has {limit} positions, but the longest prompt has {longest} tokens:"
            " lower max_prompt_length"
        )


def chunks(order: list[int], size: int, progress: bool, name: str) -> Iterator[list[int]]:
    """Yield chunks of ``size`` items of ``order``, with a progress bar."""
    with tqdm(total=len(order), desc=name, disable=not progress) as bar:
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            yield chunk
            bar.update(len(chunk))
