"""The record of a run in its folder: options, digests of data and models, and last metrics.

If a user repeats the command, it resumes the run only if options and digests match the record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from lens_kernels.hf.training import provenance
from lens_kernels.hf.training.text_files import read_text, write_text
from lens_kernels.option_files import MADE_WITH

# RECORD is written when a run starts, and is a valid file for --config. METRICS is written when the
# run is complete.
RECORD, METRICS = "run.yaml", "metrics.json"

# Options that a run may change when it resumes, because they do not change the trained weights. An
# entry also matches longer names that begin with it, such as options of later transformers
# versions.
UNTRAINED = (
    "output_dir",
    "allow_download",
    *("log_", "logging_", "report_to", "run_name", "project", "trackio_", "disable_tqdm"),
    *("hub_", "push_to_hub", "do_", "skip_memory_metrics", "include_num_input_tokens_seen"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_timeout"),
    *("gradient_checkpointing", "activation_checkpointing", "torch_empty_cache_steps"),
)
# Options of evaluation and saving. They change the final weights only with load_best_model_at_end,
# because they decide which checkpoint is the best.
CHOOSING = ("eval_", "per_device_eval_", "batch_eval_", "prediction_loss_only", "save_")
# Options that decide the length of a run. Increasing one of them continues a complete run.
LENGTHS = ("max_steps", "num_train_epochs")
# Options that name a file or a folder besides data and models. ``check_digests`` compares contents.
FILES = ("student_lens", "teacher_lens", "teacher_targets")
# Learning-rate schedules that do not depend on a run's number of steps.
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")


def check_options(output: Path, now: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """Compare a command's options ``now`` with the options that the run was started with.

    Different paths to the same file or folder count as equal. Options that do not change weights
    are not compared. ``check_digests`` compares the contents of files.

    Returns:
        A message if a longer run was requested, which continues the recorded run; otherwise "".

    Raises:
        ValueError: The run was started with other options, or its record cannot be read.
    """
    record = output / RECORD
    if not record.exists():
        return ""
    before = _read(record)
    before.pop(MADE_WITH, None)
    if not _has_trained(output):
        return ""
    best = {**defaults, **now}.get("load_best_model_at_end")
    ignored = UNTRAINED if best else UNTRAINED + CHOOSING
    differing, longer = [], ""
    for name in sorted(before.keys() | now.keys()):
        was, will = (x.get(name, defaults.get(name)) for x in (before, now))
        if name.startswith(ignored) or _meaning(name, was) == _meaning(name, will):
            continue
        if name in LENGTHS and _is_longer(was, will):
            longer = f"{name} was {was} and is {will}: the run is continued"
            schedule = {**defaults, **now}.get("lr_scheduler_type")
            if schedule not in ENDLESS:
                longer += f"; from here on the {schedule} schedule is that of the longer run"
        else:
            differing.append(f"{name} (was {was}, is {will})")
    if differing:
        raise ValueError(
            f"{output} holds a run with other options: {', '.join(differing)}. To resume it, use"
            f" the options in {record}; otherwise choose another output_dir"
        )
    return longer


def check_digests(
    output: Path, places: Mapping[str, str], digests: Mapping[str, str | None]
) -> None:
    """Raise if the data or the models have changed since the run started."""
    file = output / RECORD
    if not file.exists():
        return
    made = _read(file).get(MADE_WITH)
    if not _has_trained(output):
        return
    before = made.get("hashes") if isinstance(made, dict) else None
    for name, place in places.items():
        was = before.get(name) if isinstance(before, dict) else None
        if None not in (was, digests[name]) and was != digests[name]:
            kind = "model" if name in ("student", "teacher") else "file"
            raise ValueError(
                f"the {name} {kind} {place} has changed since the run in {output} started: restore"
                f" the {kind} to resume, or use another output_dir to start a new run"
            )


def metrics_of(output: Path) -> dict[str, float] | None:
    """Return the metrics of a complete run, or None if their file is missing or damaged."""
    try:
        metrics = json.loads(read_text(output / METRICS))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return metrics if isinstance(metrics, dict) else None


def write_start(
    output: Path, options: Mapping[str, object], digests: Mapping[str, str | None]
) -> None:
    """Write the run's options, versions and digests, to compare later commands with them."""
    output.mkdir(parents=True, exist_ok=True)
    made = {"versions": provenance.versions(), "commit": provenance.commit()}
    parts = (dict(options), {MADE_WITH: {**made, "hashes": dict(digests)}})
    write_text(output / RECORD, "".join(yaml.safe_dump(x, sort_keys=True) for x in parts if x))


def write_metrics(output: Path, metrics: Mapping[str, float]) -> None:
    """Write the metrics of a complete run."""
    write_text(output / METRICS, json.dumps(dict(metrics), indent=1))


def _has_trained(output: Path) -> bool:
    """Return whether the folder already has a checkpoint, weights or metrics."""
    names = ("checkpoint-*", "*.safetensors", METRICS)
    return any(file for name in names for file in output.glob(name))


def _read(file: Path) -> dict[str, object]:
    try:
        content = yaml.safe_load(read_text(file))
        if not isinstance(content, dict):
            raise ValueError(f"the file holds a {type(content).__name__}")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{file}, the record of the run in this folder, cannot be read ({reason}):"
            " restore it, or choose another output_dir"
        ) from error
    return content


def _meaning(name: str, value: object) -> object:
    return MEANINGS.get(name, lambda x: x)(value)


def _place(path: object) -> object:
    """Return the absolute path of an existing file or folder. Return other names unchanged."""
    return str(Path(path).resolve()) if isinstance(path, str) and Path(path).exists() else path


# Maps options to functions. Two values of the option count as equal if the function gives equal
# results. Only the presence of data is compared: ``check_digests`` compares its contents.
MEANINGS: dict[str, Callable[[object], object]] = {
    "student": _place,
    "teacher": _place,
    "data": lambda path: path is not None,
    "eval_data": lambda path: path is not None,
    **dict.fromkeys(("teacher_cache", *FILES), lambda path: path is not None),
}


def _is_longer(was: object, now: object) -> bool:
    return isinstance(was, (int, float)) and isinstance(now, (int, float)) and now > was > 0
