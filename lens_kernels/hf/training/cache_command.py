"""The command ``lens-kernels cache``: write sparse targets from a teacher or a server's answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lens_kernels.hf.cache.key import CacheKey, Example, Indexed, counted_positions, file_digest
from lens_kernels.hf.cache.logprobs import FORMATS, check_examples, read, targets_of
from lens_kernels.hf.cache.sampling import most_probable, sample
from lens_kernels.hf.cache.targets import MakeTargets, TargetCache, kind_of
from lens_kernels.hf.model.anatomy import lens_head_from
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.loading import load_model, load_tokenizer
from lens_kernels.hf.model.placement import moved
from lens_kernels.hf.training.checks import Limits, check_data
from lens_kernels.hf.training.collation import Collator, padding_id
from lens_kernels.hf.training.data import PROMPT_STYLES, load_examples
from lens_kernels.hf.training.files import check_download
from lens_kernels.options import check_count, check_number
from lens_kernels.targets import RESTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("sampled", "topk", "logprobs")
# The number of positions for which the teacher's logits are computed at a time.
ROWS = 256


def make_cache(
    kind: str,
    data: str,
    output: Path,
    *,
    eval_data: str | None = None,
    teacher: str | None = None,
    tokenizer: str | None = None,
    samples: int = 50,
    top_k: int = 20,
    temperature: float = 1.0,
    proposal_temperature: float = 1.0,
    rest: str = "ghost",
    logprobs: Path | None = None,
    eval_logprobs: Path | None = None,
    logprobs_format: str = "records",
    prompt_style: str = "alpaca",
    max_length: int = 512,
    max_prompt_length: int = 256,
    teacher_dtype: str = "auto",
    batch_size: int = 8,
    seed: int = 0,
    allow_download: bool = False,
    say: Callable[[str], None],
) -> None:
    """Store probabilities of a few tokens for each position, to train without the teacher model.

    Args:
        kind: sampled for sampled tokens, which are unbiased; topk for the most probable tokens; or
            logprobs for log-probabilities that an inference server returned.
        data: Data to train on, as for lens-kernels train.
        output: Folder for the sparse targets. They are written to its subfolders train and eval.
        eval_data: Data to evaluate on.
        teacher: Folder or Hub name of the teacher. The kinds sampled and topk need it.
        tokenizer: Folder or Hub name of the tokenizer. By default it is the teacher's.
        samples: Number of tokens drawn for each position, with replacement, for sampled.
        top_k: Number of tokens stored for each position, for topk.
        temperature: Divides the teacher's logits before the softmax.
        proposal_temperature: Divides the logits once more for the distribution that tokens are
            drawn from. If it is not 1, the drawn tokens get importance weights.
        rest: Treatment of the probability of tokens that are not stored, for topk and logprobs:
            ghost (one more entry), uniform or renormalize.
        logprobs: JSON Lines or Parquet file of log-probabilities for data.
        eval_logprobs: JSON Lines or Parquet file of log-probabilities for eval_data.
        logprobs_format: Format of these files: records, or vllm for the answers of vLLM with
            prompt_logprobs.
        prompt_style: Format of prompts, as for lens-kernels train.
        max_length: Maximum tokens per example, as for lens-kernels train.
        max_prompt_length: Maximum tokens per prompt, as for lens-kernels train.
        teacher_dtype: Dtype of the teacher's weights.
        batch_size: Examples in a forward pass.
        seed: Random seed of the draws.
        allow_download: Allow downloads from the Hugging Face Hub.
        say: Called with a summary of each dataset's targets.

    Raises:
        ValueError: An option is missing or out of range, or the data or the log-probabilities are
            invalid.
    """
    known = {"kind": (kind, KINDS), "rest": (rest, [x for x in RESTS if x])}
    known["logprobs_format"] = (logprobs_format, FORMATS)
    known["prompt_style"] = (prompt_style, [*PROMPT_STYLES])
    for name, (value, choices) in known.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    counts = {"samples": samples, "top_k": top_k, "batch_size": batch_size}
    for name, number in counts.items():
        check_count(name, number)
    check_number("temperature", temperature, 0.0)
    check_number("proposal_temperature", proposal_temperature, 0.0)
    served = kind == "logprobs"
    if served and temperature != 1.0:
        raise ValueError(
            f"temperature={temperature:g} does not apply to kind logprobs, because the file has"
            " only the top of each distribution: leave it out, and set it in the requests to the"
            " server"
        )
    if kind != "sampled" and proposal_temperature != 1.0:
        raise ValueError(
            f"proposal_temperature={proposal_temperature:g} applies to kind sampled only: leave it"
            " out"
        )
    if teacher is None and not (served and tokenizer):
        raise ValueError(f"kind {kind} needs --{'tokenizer' if served else 'teacher'}")
    paths = {name: x for name, x in (("train", data), ("eval", eval_data)) if x is not None}
    files = {"train": logprobs, "eval": eval_logprobs}
    for name in paths:
        check_download(paths[name], allow_download)
        if served and files[name] is None:
            option, of = ("logprobs", "data") if name == "train" else ("eval_logprobs", "eval_data")
            raise ValueError(f"kind logprobs needs --{option}, the file for --{of}")
    reader = load_tokenizer(str(tokenizer or teacher), allow_download)
    model = None
    if not served:
        model = load_model(str(teacher), teacher_dtype, allow_download).eval()
        moved(model, "cuda" if torch.cuda.is_available() else "cpu")
    settings = _Settings(kind, samples, top_k, temperature, proposal_temperature, seed)
    number = {"sampled": samples, "topk": top_k, "logprobs": 0}[kind]
    of_rest = None if kind == "sampled" else rest
    for name, path in paths.items():
        examples = load_examples(
            path,
            reader,
            prompt_style=prompt_style,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
        )
        # The same folder must not be taken for targets of another seed or another file.
        source = f"seed-{seed}" if kind == "sampled" else "teacher"
        if model is None:
            file = Path(str(files[name]))
            make = _from_file(file, logprobs_format, examples)
            source = f"{logprobs_format}-{file_digest(file)[:16]}"
        else:
            collate = Collator(padding_id(reader))
            check_data(path, examples, Limits.of([model], None), collate)
            make = _from_teacher(model, collate, settings)
        described = kind_of(kind, number, temperature, proposal_temperature, source, of_rest)
        key = CacheKey.of(model, examples, (), reader, kind=described)
        say(TargetCache.build(output / name, key, examples, make, batch_size=batch_size).summary())


class _Settings(NamedTuple):
    kind: str
    samples: int
    top_k: int
    temperature: float
    proposal_temperature: float
    seed: int


def _from_file(path: Path, form: str, data: Indexed) -> MakeTargets:
    found = read(path, form)
    check_examples(found, data, path, form)

    def make(numbers: range, examples: list[Example]) -> list[dict[str, Tensor]]:
        return [targets_of(found, i, x, path) for i, x in zip(numbers, examples, strict=True)]

    return make


def _from_teacher(teacher: PreTrainedModel, collate: Collator, settings: _Settings) -> MakeTargets:
    """Return a function that computes the targets of examples by running the teacher.

    The tokens that are drawn for an example depend only on the seed and the example's position.
    """
    whole = lens_head_from(teacher)
    device = whole.weight.device

    def one(states: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        products = states.to(whole.weight.dtype) @ whole.weight.T
        logits = whole.logits(products.float(), settings.temperature)[0]
        if settings.kind == "topk":
            return most_probable(logits, settings.top_k)
        return sample(logits, settings.samples, settings.proposal_temperature, generator)

    @torch.no_grad()
    def make(numbers: range, examples: list[Example]) -> list[dict[str, Tensor]]:
        inputs = {name: x.to(device) for name, x in collate(examples).items()}
        del inputs["labels"]
        final = hidden_states(teacher, [], inputs)[1]
        result = []
        for number, example, states in zip(numbers, examples, final, strict=True):
            generator = torch.Generator(device).manual_seed(settings.seed * 1_000_003 + number)
            rows = states[counted_positions(example["labels"]).to(device)]
            # An example without labels still gives one empty part, so that ``parts[0]`` exists.
            parts = [one(part, generator) for part in rows.split(ROWS)]
            result.append({name: torch.cat([x[name] for x in parts]) for name in parts[0]})
        return result

    return make
