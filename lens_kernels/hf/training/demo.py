"""The demo: a short distillation of SmolLM2-135M into 20 of its 30 blocks.

The models read the help topics of Python's standard library.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from lens_kernels import cache as user_cache
from lens_kernels.hf.model.smollm2 import smollm2
from lens_kernels.hf.model.student import shallow_copy
from lens_kernels.hf.training import report
from lens_kernels.hf.training.config import LensDistillConfig
from lens_kernels.hf.training.data import check_count
from lens_kernels.hf.training.meter import evaluate
from lens_kernels.hf.training.text_files import write_text
from lens_kernels.hf.training.trainer import LensDistillTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The number of tokens in an example.
BLOCK = 128
# Every eighth help topic is used for evaluation, not for training.
HELD_OUT_EVERY = 8
EVAL_BATCHES = 6
LENS_PAIRS = 3
# The blocks that the student leaves out. Of nine choices of ten blocks, these gave the best
# untrained student.
DROPPED = range(13, 23)
PROMPT = "The import statement is used to"


class _QuietProgress(ProgressCallback):
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if self.training_bar is not None and logs and "kd" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def texts() -> tuple[str, str]:
    """Return training text and held-out text from the help topics of the standard library.

    The held-out text leaves out all paragraphs that also occur in the training text.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = set(names[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    train, held = (
        "\n\n".join(topics[name].strip() for name in names if (name in held_out) == kept)
        for kept in (False, True)
    )
    return train, "\n\n".join(p for p in held.split("\n\n") if p not in train)


def examples(tokenizer: PreTrainedTokenizerBase, text: str) -> list[dict[str, Tensor]]:
    """Split a text into examples of ``BLOCK`` tokens. All tokens are trained on."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [{"input_ids": x, "labels": x} for x in ids[: len(ids) // BLOCK * BLOCK].split(BLOCK)]


def batches(data: Sequence[dict[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of ``size`` examples. The last batch may be smaller."""
    for start in range(0, len(data), size):
        chunk = data[start : start + size]
        yield {key: torch.stack([x[key] for x in chunk]) for key in chunk[0]}


def distil(
    output: Path = Path("demo_output"),
    cache: Path | None = None,
    steps: int = 40,
    seed: int = 0,
    *,
    say: Callable[[str], None],
) -> None:
    """Distil SmolLM2-135M into 20 of its 30 blocks, without network access.

    Args:
        output: Folder for the results.
        cache: Folder for the converted teacher; by default the user's cache folder.
        steps: Number of optimiser steps.
        seed: Random seed.
        say: Called with each line of progress.

    Raises:
        RuntimeError: A score did not improve, or the package with the teacher is missing.
    """
    check_count("steps", steps, 1)
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    say("Loading the teacher, SmolLM2-135M-Instruct (the first run converts it, about 30 s)")
    teacher, tokenizer = smollm2(cache or user_cache.folder())
    blocks = range(1, teacher.config.num_hidden_layers + 1)
    student = shallow_copy(teacher, [i for i in blocks if i not in DROPPED])
    train_text, held_text = texts()
    train = examples(tokenizer, train_text)
    held = list(batches(examples(tokenizer, held_text), 4))[:EVAL_BATCHES]

    args = LensDistillConfig(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=4e-4,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=seed,
        num_lens_pairs=LENS_PAIRS,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = LensDistillTrainer(
        student, teacher, args, train_dataset=train, processing_class=tokenizer
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_QuietProgress)
    objective = trainer.lens_objective
    assert objective is not None
    say(
        f"Teacher: {len(blocks)} blocks. Student: {student.config.num_hidden_layers} blocks,"
        f" without {DROPPED[0]} to {DROPPED[-1]}."
        f" Lens pairs: {objective.student_layers} | {objective.teacher_layers}."
        f" Text: {len(train) * BLOCK:,} training tokens,"
        f" {sum(x['labels'].numel() for x in held):,} held out"
    )
    device = trainer.args.device
    held = [{key: x.to(device) for key, x in batch.items()} for batch in held]
    say("Evaluating the untrained student on held-out text")
    names = {"ce": "cross entropy", "kd": f"final {args.final_divergence}"}
    pairs = objective.student_layers, objective.teacher_layers
    names |= {
        f"lens_{s}": f"lens {args.lens_divergence}, blocks {s} | {t}"
        for s, t in zip(*pairs, strict=True)
    }

    def measured() -> dict[str, float]:
        means = evaluate(objective, held)
        return {key: means[key] for key in names}

    before = measured()
    say(f"Training for {steps} steps of {4 * BLOCK} tokens")
    trainer.train()
    say("Evaluating again")
    after = measured()

    folder = output / "student"
    trainer.save_model(str(folder))
    report.depth_figure(
        output / "divergence_by_depth.png", before, after, *pairs, args.lens_divergence
    )
    history = trainer.state.log_history
    report.loss_figure(output / "loss.png", history, args.final_divergence)
    result = {"before": before, "after": after, "history": history}
    write_text(output / "result.json", json.dumps(result, indent=1))

    say("\n" + report.table([(names[key], before[key], after[key]) for key in before]))
    say(f"\nThe saved student continues: {PROMPT}{sample(folder)}")
    say(
        f"\nStudent: {folder}\nFigures: {output / 'divergence_by_depth.png'},"
        f" {output / 'loss.png'}\nTime: {time.monotonic() - started:.0f} s"
    )
    if not all(after[key] < before[key] for key in before):
        raise RuntimeError("some scores did not improve: train longer, with more --steps")


def sample(folder: Path) -> str:
    """Return the greedy continuation of ``PROMPT`` by the model saved in ``folder``."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(
        **prompt,
        max_new_tokens=40,
        do_sample=False,
        no_repeat_ngram_size=4,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)
