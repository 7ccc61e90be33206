"""The ``lens-kernels train`` command: options, models, data and resuming."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import HfArgumentParser, set_seed

from lens_kernels.arguments import Options, Parser, underscored
from lens_kernels.hf.model.loading import DTYPES, check_tokenizers, load_model, load_tokenizer
from lens_kernels.hf.model.placement import QUANTIZATIONS, SPREADS, check_placement
from lens_kernels.hf.model.student import shallow_copy
from lens_kernels.hf.training import record, report
from lens_kernels.hf.training.checkpoints import last_whole
from lens_kernels.hf.training.config import LensDistillConfig, is_secret, option
from lens_kernels.hf.training.data import load_examples
from lens_kernels.hf.training.files import check_download, source_digest
from lens_kernels.hf.training.preparation import Rows, Stream
from lens_kernels.hf.training.provenance import folder_digest, model_digest
from lens_kernels.hf.training.trainer import LensDistillTrainer
from lens_kernels.hf.training.whole_heads import whole_model
from lens_kernels.option_files import as_words, read_options
from lens_kernels.options import check_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"  # peft's name for all linear layers


@dataclass
class RunConfig:
    """The models and data of a run."""

    student: str = option(
        None, "Folder or Hub name of the student model, or of a LoRA adapter.", required=True
    )
    data: str = option(
        None,
        "Data to train on: a JSON Lines, JSON or Parquet file, a pattern, a folder saved by"
        " datasets, or hub:NAME. Each record has the keys instruction/input/output,"
        " prompt/completion, messages, conversations, or text.",
        required=True,
    )
    teacher: str | None = option(
        None, "Folder or Hub name of the teacher model, or of a LoRA adapter."
    )
    eval_data: str | None = option(None, "Data to evaluate the objective on.")
    student_blocks: list[int] | None = option(
        None, "Keep only these blocks of the student model (1 is the first)."
    )
    student_dtype: str = option(
        "float32",
        "Dtype of the student's weights. float16 needs an adapter.",
        choices=list(DTYPES),
    )
    teacher_dtype: str = option("auto", "Dtype of the teacher's weights.", choices=list(DTYPES))
    teacher_quantization: str | None = option(
        None,
        "Quantise the teacher's linear layers, except its head, with bitsandbytes.",
        choices=list(QUANTIZATIONS),
    )
    teacher_device_map: str | None = option(
        None,
        "Device of the teacher, such as cuda:1, or auto to spread its blocks over all devices."
        " Default: the student's device.",
    )
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

    def __post_init__(self) -> None:
        """Check the teacher's devices and the buffer before any file is read."""
        check_number("shuffle_buffer", self.shuffle_buffer, 0, inclusive=True)
        check_placement(self.teacher_quantization, self.teacher_device_map, "teacher_")


KINDS: Any = (RunConfig, LensDistillConfig)
# The options of transformers' Trainer that ``--help`` shows. ``--help_all`` shows all of them.
USED = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "bf16", "gradient_checkpointing", "eval_strategy", "eval_steps"),
    *("save_steps", "logging_steps", "report_to", "seed", "use_cpu"),
)


class _TrainParser(Parser, HfArgumentParser):
    """Parses options that are fields of dataclasses."""


def presets() -> dict[str, Options]:
    """Return each preset's options by its name."""
    folder = resources.files("lens_kernels.hf.training") / "presets"
    return {
        file.name.removesuffix(".yaml"): read_options(file.read_text(encoding="utf-8"))
        for file in sorted(folder.iterdir(), key=lambda x: x.name)
    }


def build_parser(everything: bool = False) -> Parser:
    """Return the parser of ``lens-kernels train``. ``everything`` adds all options to its help."""
    own = {x.name for x in fields(RunConfig)} | {"output_dir"}
    objective = {*LensDistillConfig.__annotations__} - own - {*USED}
    others = {x.name for x in fields(LensDistillConfig)} - own - objective - {*USED}
    sections = {
        "models and data": own,
        "objective": objective,
        "transformers' Trainer (--help_all shows its other options)": USED,
        "other options of transformers' Trainer": others,
    }
    given = presets()
    parser = _TrainParser(
        KINDS,
        prog="lens-kernels train",
        description="Distil a teacher into a student. The same command resumes an interrupted run.",
        sections=sections,
        hidden=() if everything else others,
        presets=given,
    )
    parser.add_argument("--help_all", action="help", help="Also show the Trainer's other options.")
    parser.add_config()
    parser.add_argument(
        "--preset",
        choices=[*given],
        help="forward_kl: best for students from random weights in the project's study. Other"
        " presets: the paper's options for a pair of models. --config and other options override a"
        " preset.",
    )
    return parser


def parse(argv: Sequence[str]) -> tuple[RunConfig, LensDistillConfig, dict[str, object]]:
    """Return the parsed options, and a dictionary of those that differ from their defaults."""
    parser = build_parser("--help_all" in map(underscored, argv))
    values = vars(parser.parse_args(argv))
    required = [x.name for x in fields(RunConfig) if x.metadata.get("required")]
    defaults = vars(parser.parse_args([x for name in required for x in (f"--{name}", "")]))
    chosen = {k: v for k, v in values.items() if v != defaults[k]}
    _check_environment(parser, values)
    hidden = ("config", "preset")
    chosen = {k: v for k, v in chosen.items() if k not in hidden and not is_secret(k)}
    try:
        config, args = (
            kind(**{x.name: values[x.name] for x in fields(kind) if x.init}) for kind in KINDS
        )
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if args.resume_from_checkpoint is not None:
        parser.error(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} is not supported: the same"
            " command resumes from the last complete checkpoint in its output_dir"
        )
    return config, args, json.loads(json.dumps(chosen))  # JSON turns Enum members into strings


def _check_environment(parser: Parser, values: Mapping[str, object]) -> None:
    """Refuse settings of accelerate's launcher, because run.yaml would not record them."""
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
    chosen: Mapping[str, object],
    say: Callable[[str], None],
) -> dict[str, float]:
    """Distil, save the student in ``output_dir``, and return the last metrics.

    Raises:
        ValueError: Data, models or options are invalid or incompatible, ``output_dir`` holds a
            run with other options, or data or models have changed since the run started.
    """
    if args.process_index > 0:
        say = _silent
    if config.teacher_device_map in SPREADS and args.world_size > 1:
        raise ValueError(
            f"teacher_device_map={config.teacher_device_map} would spread the teacher of each of"
            f" the {args.world_size} processes over the same devices: leave it out, so that each"
            " process has a teacher on its own device, or start one process"
        )
    stored = args.teacher_cache or args.teacher_targets
    if config.streaming and (args.max_steps < 1 or stored or args.dataloader_num_workers):
        raise ValueError(
            "--streaming reads the data during training, in order: set --max_steps, and leave"
            " --teacher_cache, --teacher_targets and --dataloader_num_workers out"
        )
    output = Path(str(args.output_dir))
    longer = record.check_options(output, chosen, _defaults())
    given = {"train": config.data, "eval": config.eval_data}
    paths = {name: path for name, path in given.items() if path is not None}
    for path in paths.values():
        check_download(path, config.allow_download)
    digests: dict[str, str | None] = {
        name: source_digest(path, streaming=config.streaming and name == "train")
        for name, path in paths.items()
    }
    beside = {name: getattr(args, name) for name in record.FILES if getattr(args, name)}
    digests |= {name: folder_digest(path) for name, path in beside.items()}
    models = {"student": config.student}
    if config.teacher is not None:
        models["teacher"] = config.teacher
    digests |= {name: model_digest(x) for name, x in models.items()}
    record.check_digests(output, paths | beside | models, digests)
    done = record.metrics_of(output)
    if done is not None and not longer:
        file = output / record.METRICS
        say(f"the run in {output} is already complete: delete {file} to repeat it")
        return done
    projections = config.teacher is not None and args.trains_matrices
    checkpoint: Path | None = None
    skipped: dict[Path, str] = {}
    # A run with save_only_model stores no optimizer state. It cannot resume exactly, so it starts
    # again.
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
            ids = set(tokenizer.get_vocab().values())  # streamed data may contain any token id
        check_tokenizers(tokenizer, other, args.vocab_size, ids)
    if config.streaming:
        datasets["train_dataset"] = Rows(config.data, config.shuffle_buffer, args.seed)
    set_seed(args.seed)
    trainer = LensDistillTrainer(
        load_student(config),
        load_teacher(config, args.device),
        args,
        **datasets,
        processing_class=tokenizer,
    )
    # The commit of a model from the Hub is known only after the download.
    digests |= {name: digests[name] or model_digest(x) for name, x in models.items()}
    facts = {"data": paths | beside, "hashes": digests, "command": command_line(chosen)}
    trainer.facts |= {**models, **facts}
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
        # After a resume, transformers divides the losses since the checkpoint by the number of all
        # steps. So its mean is wrong, and is left out.
        metrics.pop("train_loss", None)
    trainer.save_model()
    if isinstance(trainer.train_dataset, Stream):
        say(f"train: {trainer.train_dataset.summary()}")
    if "eval_dataset" in datasets:
        metrics |= trainer.evaluate()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        record.write_metrics(output, metrics)
        report.loss_figure(output / "loss.png", trainer.state.log_history, args.final_divergence)
    say("\n".join(f"{name:<28} {value:.6g}" for name, value in metrics.items()))
    say(f"student and reports: {output}")
    return metrics


def command_line(chosen: Mapping[str, object]) -> str:
    """Return the ``lens-kernels train`` command with the options in ``chosen``."""
    words = ["lens-kernels", "train"]
    for name, value in chosen.items():
        words += [f"--{name}", *(as_words(value) or [])]
    return shlex.join(words)


def _silent(text: str) -> None:
    """Print nothing. Ranks other than 0 pass this function as ``say``."""


def load_student(config: RunConfig) -> Any:
    """Load the student. If options say so, keep some of its blocks and add a LoRA adapter."""
    student = load_model(config.student, config.student_dtype, config.allow_download)
    if config.student_blocks is not None:
        with whole_model(student):
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
            # Inside a list, peft takes all-linear for a module's name.
            target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        )
        return get_peft_model(student, adapter)
    return student


def load_teacher(config: RunConfig, device: torch.device) -> PreTrainedModel | None:
    """Load the teacher, or return None if the options name no teacher.

    A quantised teacher is loaded on ``device``, because it cannot be moved later.
    """
    if config.teacher is None:
        return None
    quantization, place = config.teacher_quantization, config.teacher_device_map
    if quantization is not None and place is None:
        place = str(device)
    dtype, download = config.teacher_dtype, config.allow_download
    return load_model(config.teacher, dtype, download, quantization, place)


def _defaults() -> dict[str, object]:
    """Return the default of every option as a value that JSON has."""
    found = {}
    for kind in KINDS:
        for x in fields(kind):
            found[x.name] = x.default
            if x.default_factory is not MISSING:
                found[x.name] = x.default_factory()
    return dict(json.loads(json.dumps(found, default=str)))
