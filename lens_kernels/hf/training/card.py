"""The model card of a distilled student."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainingArguments

from lens_kernels.hf.training import provenance
from lens_kernels.hf.training.config import LensDistillConfig
from lens_kernels.version import __version__
from lens_kernels.visible import visible

ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
# Options that do not change the trained weights, and the layers, which the card lists elsewhere.
LEFT_OUT = {
    *("output_dir", "save_total_limit", "logging_steps", "lens_backend", "teacher_cache"),
    *("student_layers", "teacher_layers", "num_lens_pairs"),
}
# The options of the Trainer that the card lists, besides those of this package.
OF_TRAINER = (
    *("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "label_smoothing_factor"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed"),
)


def model_card(trainer: Any, facts: Mapping[str, Any]) -> ModelCard:
    """Return the card of a trainer's student.

    Args:
        trainer: A ``LensDistillTrainer`` after training.
        facts: A mapping with the models' names, ``student`` and ``teacher``. It may also have the
            ``command`` line; ``data``, which maps names of datasets to their sources; and
            ``hashes``, which maps names of datasets and models to digests.
    """
    objective, args = trainer.lens_objective, trainer.args
    student, teacher = (facts.get(name) or "a model in memory" for name in ("student", "teacher"))
    data = ModelCardData(
        library_name="peft" if hasattr(trainer.model, "peft_config") else "transformers",
        base_model=student if _is_on_hub(student) else None,
        tags=["lens-kernels", "distillation", "logit-lens", "generated_from_trainer"],
        pipeline_tag="text-generation",
    )
    made = f"with lens_kernels {__version__}."
    text = [f"# {visible(Path(args.output_dir).resolve().name)}", ""]
    origins = [] if objective is None else [_code(teacher)]
    if args.teacher_targets:
        origins.append(f"the targets {_code(args.teacher_targets)}")
    how = f"distilled from {' and '.join(origins)}" if origins else "fine-tuned"
    text += [f"{_code(student)}, {how} {made}", ""]
    if objective is not None:
        pairs = zip(objective.student_layers, objective.teacher_layers, strict=True)
        listed = ", ".join(f"{s} and {t}" for s, t in pairs)
        text += [
            "## Objective",
            "",
            "`(1 - kd_ratio) CE + kd_ratio (D_final + lens_coeff * mean of D_lens over pairs)`",
            "",
            f"Lens pairs, block of the student and of the teacher: {listed or 'none'}.",
            "",
        ]
    text += _table("option", _options(args))
    if hashes := facts.get("hashes"):
        sources = {**facts["data"], "student": student, "teacher": teacher}
        rows = {f"{k}: {_code(sources[k])}": x for k, x in hashes.items()}
        text += ["## Data and models", "", *_table("source", rows, "SHA-256 or commit")]
    text += [f"## Metrics after {trainer.state.global_step} steps", ""]
    text += [
        "Means over tokens, in nats per token.",
        "",
        *_table("metric", _metrics(trainer.state.log_history)),
    ]
    if "command" in facts:
        text += ["## Command", "", "```sh", visible(facts["command"]), "```", ""]
    versions = provenance.versions()
    if commit := provenance.commit():
        versions["commit of the user's folder"] = commit
    text += ["## Versions", "", *_table("package", versions, "version")]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text))


def _options(args: LensDistillConfig) -> dict[str, Any]:
    """Return the options that decide the trained weights, without those that are not set."""
    trainers = {x.name for x in fields(TrainingArguments)}
    own = [x.name for x in fields(args) if x.name not in trainers | LEFT_OUT]
    values = {name: getattr(args, name) for name in [*own, *OF_TRAINER]}
    return {name: value for name, value in values.items() if value is not None}


def _metrics(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the last training means and the last evaluation means that the trainer logged."""
    found: dict[str, float] = {}
    for kind in ("loss", "eval_loss"):
        last: Mapping[str, float] = next((x for x in reversed(history) if kind in x), {})
        found |= {k: x for k, x in last.items() if k not in ("step", "epoch", "learning_rate")}
    return {k: x for k, x in found.items() if not k.endswith(("_runtime", "_per_second"))}


def _table(heading: str, values: Mapping[str, object], second: str = "value") -> list[str]:
    rows = [f"| {heading} | {second} |", "|---|---|"]
    for name, value in values.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(getattr(value, "value", value))
        rows.append(f"| {name} | {shown} |")
    return [*rows, ""]


def _code(value: object) -> str:
    """Return ``value`` as Markdown code, without characters that end the code or a table cell."""
    return "`" + re.sub(r"[`|\n]", "_", visible(str(value))) + "`"


def _is_on_hub(name: str) -> bool:
    return ON_HUB.fullmatch(name) is not None and not Path(name).exists()
