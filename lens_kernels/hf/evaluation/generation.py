"""ROUGE-L of the answers that a model generates, and its cross entropy on held-out data."""

from __future__ import annotations

import inspect
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from lens_kernels.hf.evaluation.rouge import load_scorer, rouge_l
from lens_kernels.hf.evaluation.sampling import (
    check_lengths,
    check_sampling,
    chunks,
    generate,
)
from lens_kernels.hf.model.loading import DTYPES, load_model, load_tokenizer
from lens_kernels.hf.model.placement import moved
from lens_kernels.hf.model.state import evaluating
from lens_kernels.hf.training.data import (
    Collator,
    Row,
    check_count,
    load_examples,
    padding_id,
    prompt_ids,
    read_rows,
)
from lens_kernels.hf.training.files import check_download
from lens_kernels.hf.training.text_files import write_text
from lens_kernels.inputs import IGNORE_INDEX
from lens_kernels.version import __version__, version_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEEDS = (10, 20, 30, 40, 50)
CHECKED = frozenset(inspect.signature(check_sampling).parameters)
PACKAGES = ("torch", "transformers", "peft", "rouge-score")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RougeResult:
    """The ROUGE-L of a model's answers, from 0 to 100."""

    scores: dict[int, float]
    """ROUGE-L by seed."""
    mean: float
    std: float | None
    """Sample standard deviation of ``scores``; None for one seed."""
    rows: int
    """Number of rows that were answered."""
    skipped: int
    """Number of rows skipped because their prompt was too long."""
    answers: list[dict[str, object]]
    """For each answered row: ``line``, ``prompt``, ``references``, and ``answers`` by seed."""


def evaluate_rouge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    seeds: Sequence[int] = SEEDS,
    prompt_style: str = "alpaca",
    max_prompt_length: int = 256,
    do_sample: bool = True,
    rouge_tokenizer: str = "english",
    after_seed: Callable[[RougeResult], None] | None = None,
    **options: Any,
) -> RougeResult:
    """Generate an answer to every row for each seed, and score it against the row's references.

    Greedy decoding (``do_sample=False``) uses only the first seed.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Rows from ``read_rows``.
        seeds: Seeds of the sampling, all different.
        prompt_style: The format of prompts, one of ``PROMPT_STYLES``.
        max_prompt_length: Maximum number of tokens in a prompt. Rows with longer prompts are
            skipped, and counted.
        do_sample: Sample answers. Otherwise decode greedily.
        rouge_tokenizer: The tokenizer that splits texts into words for ROUGE-L; see ``rouge_l``.
        after_seed: Called after each seed with the result so far.
        options: Other arguments of ``generate``.
    """
    check_seeds(seeds)
    # fails before the slow generation if rouge-score is missing
    load_scorer(rouge_tokenizer)
    asked = asked_rows(rows, tokenizer, prompt_style, max_prompt_length)
    answers: dict[int, list[str]] = {}
    scores: dict[int, float] = {}
    result = None
    for seed in seeds if do_sample else seeds[:1]:
        prompts = [ids for _, ids in asked]
        texts = generate(model, tokenizer, prompts, seed=seed, do_sample=do_sample, **options)
        references = [row.references for row, _ in asked]
        answers[seed], scores[seed] = texts, rouge_l(texts, references, rouge_tokenizer)
        result = RougeResult(
            scores=dict(scores),
            mean=statistics.fmean(scores.values()),
            std=statistics.stdev(scores.values()) if len(scores) > 1 else None,
            rows=len(asked),
            skipped=len(rows) - len(asked),
            answers=[
                {
                    "line": row.line,
                    "prompt": tokenizer.decode(ids),
                    "references": list(row.references),
                    "answers": {seed: texts[i] for seed, texts in answers.items()},
                }
                for i, (row, ids) in enumerate(asked)
            ],
        )
        if after_seed is not None:
            after_seed(result)
    assert result is not None
    return result


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise an error unless there is at least one seed and all seeds differ."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must hold at least one seed, all different, got {list(seeds)}")


def asked_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    prompt_style: str,
    max_prompt_length: int,
) -> list[tuple[Row, list[int]]]:
    """Return the rows whose prompts are short enough, and the token ids of these prompts."""
    prompts = ((x, prompt_ids(x, tokenizer, prompt_style, max_prompt_length)) for x in rows)
    asked = [(row, ids) for row, ids in prompts if ids is not None]
    if not asked:
        raise ValueError(
            f"rows must hold at least one prompt of max_prompt_length={max_prompt_length} tokens or"
            f" fewer, but all of the {len(rows)} rows are longer: raise max_prompt_length"
        )
    return asked


@torch.no_grad()
def held_out_ce(
    model: PreTrainedModel,
    examples: Any,
    collator: Collator,
    batch_size: int = 8,
    *,
    progress: bool = False,
) -> float:
    """Return the mean cross entropy of the tokens with a label, in nats.

    The mean is over all tokens, so it does not depend on ``batch_size``. Only one batch's logits
    are in memory at a time.

    Args:
        model: A causal language model.
        examples: A sequence or dataset of mappings with ``input_ids`` and ``labels``.
        collator: Combines a list of examples into a batch.
        batch_size: Number of examples in a batch.
        progress: Show a progress bar.
    """
    check_count("batch_size", batch_size, 1)
    lengths = [len(examples[i]["input_ids"]) for i in range(len(examples))]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    total, tokens = 0.0, 0
    with evaluating(model):
        for chunk in chunks(order, batch_size, progress, "cross entropy"):
            batch = collator([examples[i] for i in chunk])
            inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            labels = batch["labels"].to(model.device)[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            labelled = labels != IGNORE_INDEX
            loss = F.cross_entropy(logits[labelled].float(), labels[labelled], reduction="sum")
            total += loss.item()
            tokens += int(labelled.sum())
    if tokens == 0:
        raise ValueError("examples must hold a label after the first position, got none")
    return total / tokens


def evaluate_model(
    student: str | Path,
    data: str | Path,
    *,
    output: str | Path | None = None,
    prompt_style: str = "alpaca",
    max_length: int = 512,
    max_prompt_length: int = 256,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    seeds: Sequence[int] = SEEDS,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    no_repeat_ngram_size: int = 6,
    rouge_tokenizer: str = "english",
    dtype: str = "float32",
    device: str | None = None,
    allow_download: bool = False,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a saved model on a file of instructions. Defaults are the paper's settings.

    Arguments, data and ``output`` are checked before the model is loaded. The two files in
    ``output`` are written again after each seed. If a file cannot be written, the evaluation still
    finishes, and ``say`` reports the scores before the error is raised.

    Args:
        student: Folder or Hub name of the model, in safetensors with its tokenizer, or of a peft
            adapter. It may be a teacher, too.
        data: Held-out data in a format that training reads.
        output: Folder for ``eval.json`` (the returned result) and ``answers.jsonl``.
        prompt_style: The format of prompts: alpaca, or chat for the tokenizer's chat template.
        max_length: Maximum number of tokens of prompt and reference, for the cross entropy.
        max_prompt_length: Maximum number of tokens in a prompt. Rows with longer prompts are
            skipped, and counted.
        max_new_tokens: Maximum number of tokens in an answer.
        batch_size: Number of rows in a batch.
        seeds: Seeds of the sampling. Each seed gives one answer per row.
        do_sample: Sample answers. Otherwise decode greedily, once.
        temperature: Divides the logits before sampling.
        top_p: Sample from the most likely tokens whose probabilities add up to this share.
        top_k: Sample from this number of most likely tokens; 0 for all.
        no_repeat_ngram_size: No n-gram of this size occurs twice in prompt and answer. 0 allows
            repetition.
        rouge_tokenizer: The tokenizer for ROUGE-L: english as in the paper, for ASCII letters and
            digits only, or unicode for any language.
        dtype: Dtype of the weights: float32, bfloat16, float16, or auto for the checkpoint's dtype.
        device: Device to run on. If not given, a GPU if there is one, else the CPU.
        allow_download: Allow downloading the model from the Hub by name.
        progress: Show progress bars.
        say: Called with the scores as text, as soon as they are known.

    Raises:
        ValueError: An argument, the data or the model is invalid.
        RuntimeError: A package or the device is missing.
        OSError: ``output`` cannot be written.
    """
    sampling: dict[str, Any] = {
        "prompt_style": prompt_style,
        "max_prompt_length": max_prompt_length,
        "seeds": list(seeds),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "rouge_tokenizer": rouge_tokenizer,
    }
    check_seeds(seeds)
    check_sampling(**{k: v for k, v in sampling.items() if k in CHECKED})
    load_scorer(rouge_tokenizer)
    check_count("max_length", max_length, 1)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(1, device=device)  # fails if the device does not exist
    folder = None if output is None else Path(output)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # fails if the folder cannot be written
    check_download(data, allow_download)
    rows = read_rows(data)
    tokenizer = load_tokenizer(str(student), allow_download)
    asked = asked_rows(rows, tokenizer, prompt_style, max_prompt_length)
    examples = load_examples(
        data,
        tokenizer,
        prompt_style=prompt_style,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        progress=progress,
    )
    model = moved(load_model(str(student), dtype, allow_download), device)
    check_lengths(model, [ids for _, ids in asked], max_new_tokens)
    collator = Collator(padding_id(tokenizer))
    cross_entropy = held_out_ce(model, examples, collator, batch_size, progress=progress)
    settings = {
        "student": str(student),
        "data": str(data),
        "max_length": max_length,
        "dtype": dtype,
        "device": device,
        **sampling,
    }
    result: dict[str, Any] = {}

    def after_seed(rouge: RougeResult) -> None:
        result.clear()
        result.update(_summary(cross_entropy, rouge, settings))
        last = not do_sample or len(rouge.scores) == len(seeds)
        if say is not None:
            seed, score = list(rouge.scores.items())[-1]
            say(table(result) if last else f"ROUGE-L, seed {seed}: {score:.4f}")
        if folder is None:
            return
        try:
            lines = [json.dumps(x, ensure_ascii=False) + "\n" for x in rouge.answers]
            write_text(folder / "answers.jsonl", "".join(lines))
            write_text(folder / "eval.json", json.dumps(result, indent=1) + "\n")
        except OSError as error:
            if last:
                raise
            _log.warning("%s cannot be written after this seed: %s", folder, error)

    if say is not None:
        say(f"cross entropy: {cross_entropy:.4f} nats per token")
    evaluate_rouge(model, tokenizer, rows, progress=progress, after_seed=after_seed, **sampling)
    return result


def _summary(
    cross_entropy: float, rouge: RougeResult, settings: Mapping[str, object]
) -> dict[str, object]:
    return {
        "cross_entropy": cross_entropy,
        "rouge_l": rouge.mean,
        "rouge_l_std": rouge.std,
        "rouge_l_by_seed": {str(seed): score for seed, score in rouge.scores.items()},
        "rows": rouge.rows,
        "skipped": rouge.skipped,
        "settings": dict(settings),
        "versions": {"lens-kernels": __version__} | {name: version_of(name) for name in PACKAGES},
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the scores of ``evaluate_model`` as a text table."""
    scores = result["rouge_l_by_seed"]
    lines = [
        ("cross entropy, nats per token", f"{result['cross_entropy']:9.4f}"),
        ("ROUGE-L, mean", f"{result['rouge_l']:9.4f}"),
    ]
    if result["rouge_l_std"] is not None:
        lines.append(("ROUGE-L, standard deviation", f"{result['rouge_l_std']:9.4f}"))
        lines += [(f"ROUGE-L, seed {seed}", f"{score:9.4f}") for seed, score in scores.items()]
    lines.append(("rows", f"{result['rows']:4d}"))
    lines.append(("rows skipped, prompt too long", f"{result['skipped']:4d}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}   {value}" for name, value in lines)
