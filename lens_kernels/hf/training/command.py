"""The ``lens-kernels train`` command: options, models, data and resuming."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, set_seed

from lens_kernels.hf.model.loading import DTYPES, check_tokenizers, load_model, load_tokenizer
from lens_kernels.hf.model.student import shallow_copy
from lens_kernels.hf.training import record, report
from lens_kernels.hf.training.checkpoints import last_whole
from lens_kernels.hf.training.config import LensDistillConfig, is_secret, option
from lens_kernels.hf.training.data import load_examples
from lens_kernels.hf.training.files import check_download, source_digest
from lens_kernels.hf.training.preparation import Rows, Stream
from lens_kernels.hf.training.text_files import read_text
from lens_kernels.hf.training.trainer import LensDistillTrainer

ALL_LINEAR = "all-linear"  # peft's name for every linear layer


@dataclass
class RunConfig:
    """The models and data of a run."""

    _argument_group_name = "models and data"

    student: str = option(
        None, "Folder or Hub name of the student model, or of a LoRA adapter.", required=True
    )
    train: str = option(
        None,
        "Data to train on: a JSON Lines, JSON or Parquet file, a pattern, a folder saved by"
        " datasets, or hub:NAME. Each record has the keys instruction/input/output,"
        " prompt/completion, messages, conversations, or text.",
        required=True,
    )
    teacher: str | None = option(
        None, "Folder or Hub name of the teacher model, or of a LoRA adapter."
    )
    eval: str | None = option(None, "Data to evaluate the objective on.")
    student_blocks: list[int] | None = option(
        None, "Keep only these blocks of the student model (1 is the first)."
    )
    student_dtype: str = option(
        "float32",
        "Dtype of the student's weights. float16 needs an adapter.",
        choices=list(DTYPES),
    )
    teacher_dtype: str = option("auto", "Dtype of the teacher's weights.", choices=list(DTYPES))
    streaming: bool = option(
        False, "Read the training data during training; needs --max_steps and no teacher cache."
    )
    shuffle_buffer: int = option(
        1000, "With streaming, the number of rows in memory from which the next one is drawn."
    )
    lora_r: int = option(0, "Rank of the student's LoRA adapter; 0 trains all weights.")
    lora_alpha: int = option(32, "Scaling parameter alpha of LoRA.")
    lora_dropout: float = option(0.1, "Dropout probability of LoRA.")
    lora_target_modules: list[str] | None = option(
        None,
        "Names of the modules that LoRA adapts, or all-linear; default: peft's choice.",
    )
    allow_download: bool = option(False, "Allow downloads from the Hugging Face Hub.")


KINDS: Any = (RunConfig, LensDistillConfig)


def presets() -> list[str]:
    """Return the names of the presets. Each preset is for a pair of models from the paper."""
    folder = resources.files("lens_kernels.hf.training") / "presets"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())


def build_parser() -> HfArgumentParser:
    """Return the parser of ``lens-kernels train``."""
    parser = HfArgumentParser(
        KINDS,
        prog="lens-kernels train",
        allow_abbrev=False,
        description="Distil a teacher into a student. The same command resumes an interrupted run.",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of options; the command line overrides it."
    )
    parser.add_argument(
        "--preset",
        choices=presets(),
        help="The paper's options for a pair of models; --config and other options override them.",
    )
    return parser


def parse(argv: Sequence[str]) -> tuple[RunConfig, LensDistillConfig, dict[str, Any]]:
    """Return the parsed options, and a dictionary of those that differ from their defaults."""
    parser = build_parser()
    files = argparse.ArgumentParser(parser.prog, add_help=False, allow_abbrev=False)
    files.add_argument("--config")
    files.add_argument("--preset", choices=presets())
    known, _ = files.parse_known_args(argv)
    given: list[str] = []
    if known.preset:
        preset = resources.files("lens_kernels.hf.training") / "presets" / f"{known.preset}.yaml"
        given += _as_arguments(parser, known.preset, preset.read_text(encoding="utf-8"))
    if known.config:
        try:
            text = read_text(Path(known.config))
        except (OSError, ValueError) as error:
            parser.error(f"--config {known.config}: {getattr(error, 'strerror', None) or error}")
        given += _as_arguments(parser, known.config, text)
    arguments = [*given, *argv]
    values = vars(parser.parse_args(arguments))
    required = [x.name for x in fields(RunConfig) if x.metadata.get("required")]
    defaults = vars(parser.parse_args([x for name in required for x in (f"--{name}", "")]))
    chosen = {k: v for k, v in values.items() if v != defaults[k]}
    _check_environment(parser, values)
    hidden = ("config", "preset")
    chosen = {k: v for k, v in chosen.items() if k not in hidden and not is_secret(k)}
    try:
        # By default this also reads options from a file that has the name of the program.
        config, args, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if args.resume_from_checkpoint is not None:
        parser.error(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} is not supported: the same"
            " command resumes from the last complete checkpoint in its output_dir"
        )
    return config, args, json.loads(json.dumps(chosen))  # converts Enum members to strings


def _check_environment(parser: HfArgumentParser, values: Mapping[str, Any]) -> None:
    """Refuse settings of accelerate's launcher that no record of the run would show."""
    for name, options in (
        ("ACCELERATE_MIXED_PRECISION", ("bf16", "fp16")),
        ("ACCELERATE_DYNAMO_BACKEND", ()),
    ):
        setting = os.environ.get(name, "no")
        if setting.lower() != "no" and not any(values[x] for x in options):
            instead = f"give --{setting} as an option, and " if setting in options else ""
            parser.error(
                f"the environment sets {name}={setting}, which the record of the run does not show:"
                f" {instead}unset it, or launch with 'no'"
            )


def train(
    config: RunConfig,
    args: LensDistillConfig,
    chosen: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, float]:
    """Distil, save the student in ``output_dir``, and return the last metrics.

    Raises:
        ValueError: Data, models or options are invalid or incompatible, ``output_dir`` holds a
            run with other options, or the data have changed since the run started.
    """
    if args.process_index > 0:
        say = _silent
    if config.streaming and (
        args.max_steps < 1 or args.teacher_cache or args.dataloader_num_workers
    ):
        raise ValueError(
            "--streaming reads the data during training, in order: set --max_steps, and leave"
            " --teacher_cache and --dataloader_num_workers out"
        )
    output = Path(str(args.output_dir))
    longer = record.check_options(output, chosen, _defaults())
    paths = {
        name: x for name, x in (("train", config.train), ("eval", config.eval)) if x is not None
    }
    for path in paths.values():
        check_download(path, config.allow_download)
    digests = {
        name: source_digest(path, streaming=config.streaming and name == "train")
        for name, path in paths.items()
    }
    record.check_data(output, paths, digests)
    done = record.metrics_of(output)
    if done is not None and not longer:
        file = output / record.METRICS
        say(f"the run in {output} is already complete: delete {file} to repeat it")
        return done
    projections = config.teacher is not None and args.mse_coeff > 0
    checkpoint: Path | None = None
    skipped: dict[Path, str] = {}
    # save_only_model stores no optimizer state. Such a run cannot resume exactly, so it restarts.
    if not args.save_only_model:
        checkpoint, skipped = last_whole(output, args.world_size, projections)
    tokenizer = load_tokenizer(config.student, config.allow_download)
    datasets: dict[str, Any] = {
        f"{name}_dataset": load_examples(
            path, tokenizer, **args.encoder_options(), progress=not args.disable_tqdm
        )
        for name, path in paths.items()
        if not (config.streaming and name == "train")
    }
    for name, dataset in datasets.items():
        say(f"{name.removesuffix('_dataset')}: {dataset.summary()}")
    if args.kd_ratio > 0 and config.teacher is not None:
        other = load_tokenizer(config.teacher, config.allow_download)
        ids = {i for data in datasets.values() for x in data.examples for i in x["input_ids"]}
        if config.streaming:
            ids = set(tokenizer.get_vocab().values())  # the data may contain any token
        check_tokenizers(tokenizer, other, args.vocab_size, ids)
    if config.streaming:
        datasets["train_dataset"] = Rows(config.train, config.shuffle_buffer, args.seed)
    set_seed(args.seed)
    trainer = LensDistillTrainer(
        load_student(config), load_teacher(config), args, **datasets, processing_class=tokenizer
    )
    if args.should_save:
        record.write_start(output, chosen, digests)
        (output / record.METRICS).unlink(missing_ok=True)
    if trainer.lens_objective is not None:
        layers = trainer.lens_objective.student_layers, trainer.lens_objective.teacher_layers
        say(f"lens pairs, student and teacher: {layers[0]} and {layers[1]}")
    for folder, reason in skipped.items():
        say(f"{folder} is skipped: {reason}")
    if longer:
        say(longer)
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    elif skipped or longer:
        say("no checkpoint to resume from: the run starts over")
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = dict(result.metrics)
    if checkpoint is not None:
        # transformers divides the losses since the checkpoint by the number of all steps.
        metrics.pop("train_loss", None)
    trainer.save_model()
    if isinstance(trainer.train_dataset, Stream):
        say(f"train: {trainer.train_dataset.summary()}")
    if "eval_dataset" in datasets:
        metrics |= trainer.evaluate()
    if trainer.is_world_process_zero():
        record.write_metrics(output, metrics)
        if any("kd" in entry for entry in trainer.state.log_history):
            report.loss_figure(
                output / "loss.png", trainer.state.log_history, args.final_divergence
            )
    say("\n".join(f"{name:<28} {value:.6g}" for name, value in metrics.items()))
    say(f"student and reports: {output}")
    return metrics


def _silent(text: str) -> None:
    """Print nothing: only rank 0 prints."""


def load_student(config: RunConfig) -> Any:
    """Load the student, keep only ``student_blocks``, and add a LoRA adapter, as configured."""
    student = load_model(config.student, config.student_dtype, config.allow_download)
    if config.student_blocks is not None:
        student = shallow_copy(student, config.student_blocks)
    if config.lora_r:
        if hasattr(student, "peft_config"):
            raise ValueError(
                f"lora_r={config.lora_r} would add a second adapter to {config.student}: leave"
                " lora_r out to train the existing adapter"
            )
        from peft import LoraConfig, get_peft_model

        targets = config.lora_target_modules
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            # peft treats all-linear as a module name if it is inside a list.
            target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        )
        student = get_peft_model(student, adapter)
    return student


def load_teacher(config: RunConfig) -> Any:
    """Load the teacher, or return None if the config has no teacher."""
    if config.teacher is None:
        return None
    return load_model(config.teacher, config.teacher_dtype, config.allow_download)


def _defaults() -> dict[str, Any]:
    """Return the default of every option, as plain values."""
    found = {}
    for kind in KINDS:
        for x in fields(kind):
            found[x.name] = x.default
            if x.default_factory is not MISSING:
                found[x.name] = x.default_factory()
    return dict(json.loads(json.dumps(found, default=str)))


def _as_arguments(parser: HfArgumentParser, name: str, text: str) -> list[str]:
    """Convert a YAML file to command-line arguments, so that one parser checks all options."""
    try:
        values = yaml.load(text, _UniqueLoader) or {}
    except (yaml.YAMLError, RecursionError) as error:
        parser.error(f"{name} is not YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"{name} must hold options as 'name: value', got a {type(values).__name__}")
    known = {x.name for kind in KINDS for x in fields(kind)}
    arguments: list[str] = []
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            parser.error(f"{name}: {key!r} is not an option{hint}")
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        arguments += [f"--{key}", *map(_as_text, items)]
    return arguments


class _UniqueLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key that occurs twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key!r} occurs twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _as_text(value: Any) -> str:
    if value is False:
        return "no"  # YAML reads the name "no" of a strategy as False, and flags accept "no" too
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)
