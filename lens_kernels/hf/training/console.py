"""The lines that a training run writes to the terminal, each of at most 100 columns."""

from __future__ import annotations

from collections.abc import Mapping

from tqdm import tqdm
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

COLUMNS = 100
# Entries of the Trainer's logs that a terminal line shows, in this order, with short names.
SHOWN = {
    "loss": "loss",
    "ce": "ce",
    "kd": "kd",
    "lens": "lens",
    "mse": "mse",
    "tokens_per_second": "tok/s",
    "learning_rate": "lr",
    "grad_norm": "grad",
}


def line(step: int, last: int, logs: Mapping[str, float]) -> str:
    """Return the terminal line of a log. Entries beyond ``COLUMNS`` columns are left out.

    Return an empty text for logs without a loss, such as the log of the run time.
    """
    of_evaluation = "eval_loss" in logs
    prefix = "eval_" if of_evaluation else ""
    if f"{prefix}loss" not in logs:
        return ""
    text = f"step {step}/{last}" + ("  evaluation" if of_evaluation else "")
    for name, short in SHOWN.items():
        if f"{prefix}{name}" in logs:
            entry = f"  {short} {float(logs[f'{prefix}{name}']):.4g}"
            if len(text) + len(entry) <= COLUMNS:
                text += entry
    return text


class Lines(TrainerCallback):
    """Writes one line to the terminal for each log of the Trainer."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Write the line of the log ``logs``, on rank 0 only."""
        text = line(state.global_step, state.max_steps, logs or {})
        if state.is_world_process_zero and text:
            tqdm.write(text)


class Progress(Lines, ProgressCallback):
    """Shows a progress bar, and writes one line above it for each log."""


# Maps callbacks of transformers that print whole logs to their replacements.
REPLACED = {PrinterCallback: Lines, ProgressCallback: Progress}


def shorten(trainer: Trainer) -> None:
    """Replace a trainer's callbacks that print whole logs to the terminal."""
    for whole, short in REPLACED.items():
        # Replace only these exact classes, and keep subclasses such as the callback for notebooks.
        if any(type(x) is whole for x in trainer.callback_handler.callbacks):
            trainer.remove_callback(whole)
            trainer.add_callback(short)
