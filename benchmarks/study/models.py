"""The study's teacher and students, and their training with the library's Trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    TrainerCallback,
    default_data_collator,
)
from transformers.utils.logging import disable_progress_bar

from benchmarks.study import data
from benchmarks.study.settings import PRETRAINED_PAIRS, Run, TeacherSettings
from lens_kernels.hf import LensDistillConfig, LensDistillTrainer
from lens_kernels.hf.model.smollm2 import smollm2
from lens_kernels.hf.model.student import shallow_copy

TEACHER_DEPTH, TEACHER_WIDTH = 6, 128
HEAD_WIDTH = 32
# The library multiplies the weight of a lens by kd_ratio. So cross entropy with a lens has this
# kd_ratio, and a lens weight that is divided by it. The output divergence hardly counts then.
ALMOST_NONE = 1e-6
# A decay maps the completed share of training to a factor of the lens weight.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "first half": lambda x: float(x < 0.5),
}


def new_model(depth: int, width: int) -> Any:
    """Return a Llama with random weights, which depend on torch's current random state."""
    config = LlamaConfig(
        vocab_size=data.VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=data.ROW,
        tie_word_embeddings=False,
        bos_token_id=data.END,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def new_student(run: Run, teacher: Any) -> Any:
    """Return a run's untrained student. All runs of a seed start from the same weights."""
    if run.blocks:
        return shallow_copy(teacher, run.blocks).requires_grad_(True)
    torch.manual_seed(run.seed)
    return new_model(run.depth, run.width)


def load_teacher(settings: TeacherSettings, folder: Path) -> Any:
    """Return the teacher from ``folder``. If it is missing, train or convert it, and save it."""
    if settings.pretrained:
        return smollm2(folder)[0].eval().requires_grad_(False)
    path = folder / f"teacher-{settings.key}.safetensors"
    torch.manual_seed(settings.seed)
    teacher = new_model(TEACHER_DEPTH, TEACHER_WIDTH)
    if path.exists():
        teacher.load_state_dict(load_file(path))
    else:
        run = Run(final="", rate=settings.rate, steps=settings.steps, seed=settings.seed)
        train(teacher, None, run, data.load(settings, folder).train, folder)
        parts = path.with_suffix(".part")
        save_file(teacher.state_dict(), parts)
        parts.replace(path)
    return teacher.eval().requires_grad_(False)


def train(
    student: Any,
    teacher: Any | None,
    run: Run,
    rows: Tensor,
    folder: Path,
    at_step: Callable[[int], None] = lambda step: None,
) -> float:
    """Train a student, and return the median CPU time of a step in milliseconds.

    ``at_step`` is called after each step, and its time is not measured. The order of the rows
    depends only on the seed.
    """
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    pairs, cache = run.pairs, None
    if run.teacher.pretrained:
        # One cache serves all runs, so it has the layers of the lens for runs without it too.
        pairs, cache = pairs or PRETRAINED_PAIRS, str(folder / "teacher_cache")
    kd_ratio = 1.0 if run.final else ALMOST_NONE if run.pairs else 0.0
    student_layers, teacher_layers = [*zip(*pairs, strict=True)] or ((), ())
    args = LensDistillConfig(
        output_dir=str(folder / "trainer"),
        student_layers=[*student_layers],
        teacher_layers=[*teacher_layers],
        final_divergence=run.final or "forward_kl",
        kd_ratio=kd_ratio,
        lens_divergence=run.lens or "jsd",
        lens_coeff=run.coeff / kd_ratio if run.lens else 0.0,
        lens_norm=run.norm,
        standardize="lens" if run.standardize else "none",
        mse_coeff=run.mse / kd_ratio if run.mse else 0.0,
        teacher_cache=cache,
        per_device_train_batch_size=run.batch,
        max_steps=run.steps,
        learning_rate=run.rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=run.warmup or run.steps // 12,
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=run.seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    watch = _Watch(run, at_step)
    trainer = LensDistillTrainer(
        student,
        teacher if kd_ratio else None,
        args,
        train_dataset=_Rows(rows),
        data_collator=default_data_collator,
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    student.eval()
    return watch.median_ms()


class _Watch(TrainerCallback):
    """Times steps, calls ``at_step``, and sets the weight of the lens during training."""

    def __init__(self, run: Run, at_step: Callable[[int], None]) -> None:
        self.run, self.at_step = run, at_step
        self.trainer: Any = None
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        objective = self.trainer.lens_objective
        if self.run.lens and self.run.decay != "constant":
            share = DECAYS[self.run.decay](state.global_step / self.run.steps)
            weight = args.lens_coeff * share
            objective.options = replace(objective.options, lens_coeff=weight)
        self.started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.process_time() - self.started)
        self.at_step(state.global_step)

    def median_ms(self) -> float:
        return 1e3 * sorted(self.times)[len(self.times) // 2]


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}
