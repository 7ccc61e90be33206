"""Checks of a trainer's arguments, models and data, before training starts."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import AcceleratorConfig

from lens_kernels import compat
from lens_kernels.hf.cache.key import Example
from lens_kernels.hf.model.families import embedded_ids
from lens_kernels.hf.model.state import gathered
from lens_kernels.hf.training.collation import Collator, columns_of
from lens_kernels.hf.training.config import LensDistillConfig
from lens_kernels.inputs import IGNORE_INDEX

if TYPE_CHECKING:
    from accelerate.state import AcceleratorState
    from transformers import PreTrainedModel

# Arguments of other trainers, each with advice for users of those trainers.
ELSEWHERE = {
    "peft_config": "wrap the model with peft.get_peft_model first",
    "teacher_model": "pass it as teacher",
    "tokenizer": "pass it as processing_class",
}
# Maps options that split sequences or layers over processes to the reason why they are not
# supported.
SPLIT = dict.fromkeys(
    ("cp_size", "sp_size"),
    "the labels of this trainer are shifted within one process, so the first token of each slice of"
    " a sequence would be lost",
) | {"tp_size": "the hidden states and heads of the lenses must be whole in each process"}
OF_LOGITS = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func")


def check_arguments(given: Mapping[str, object], teacher: object) -> None:
    """Raise if an argument in ``given`` is unknown, or is not supported with a teacher."""
    known = inspect.signature(Trainer.__init__).parameters
    for name in given:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, 1)
        hint = ELSEWHERE.get(name, f"did you mean {close[0]}?" if close else "leave it out")
        raise TypeError(f"LensDistillTrainer does not take {name}: {hint}")
    for name in OF_LOGITS:
        if teacher is not None and given.get(name) is not None:
            raise ValueError(
                f"{name} needs logits, but with a teacher no logits are stored: leave {name} out,"
                " or train without a teacher"
            )


def check_model(name: str, model: object) -> None:
    """Raise if ``model`` is a string that names no folder, or a compiled module."""
    if isinstance(model, str):
        if not Path(model).is_dir():
            raise ValueError(
                f"{name}={model!r} is not a folder: give the folder of a model, or load the model"
                " with from_pretrained and pass the model"
            )
    elif compat.is_compiled(model):
        raise TypeError(
            f"{name} is compiled, but the loss runs inside the student's forward call and compiles"
            " its own code: pass the model without torch.compile"
        )


@dataclass(frozen=True)
class Limits:
    """The largest ids, positions and labels that the models of a run support."""

    ids: int
    positions: int | None
    vocab_size: int | None

    @classmethod
    def of(cls, models: Sequence[PreTrainedModel], vocab_size: int | None) -> Limits:
        """Return the limits that hold for all ``models``."""
        ids = min(map(embedded_ids, models))
        positions = [x for x in map(_learnt_positions, models) if x is not None]
        return cls(ids, min(positions, default=None), vocab_size)

    def check(self, where: str, example: Example) -> None:
        """Raise if an example is empty or too long, or if an id or a label is out of range."""
        for column in ("input_ids", "labels", "position_ids"):
            if column in example:
                _check_ids(
                    where, column, torch.as_tensor(example[column]), self.ids, self.positions
                )
        if self.vocab_size is not None and "labels" in example:
            labels = torch.as_tensor(example["labels"])[..., 1:]
            _check_labels(where, labels, self.vocab_size)


def check_data(name: str, dataset: object, limits: Limits, collator: object) -> None:
    """Check every example of a dataset. Datasets that cannot be indexed are not checked.

    Raises:
        ValueError: An example fails ``check_example``, or no example has a label that counts.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return
    ours, labelled = isinstance(collator, Collator), 0
    for i in range(len(dataset)):
        example = dataset[i]
        if not ours and not isinstance(example, Mapping):
            return  # only the user's own collator can read such examples
        labelled += check_example(f"example {i} of {name}", example, limits, ours)
    if ours and len(dataset) and not labelled:
        raise ValueError(
            f"{name} has no token to train on, because every label after the first is"
            f" {IGNORE_INDEX}: set the labels of the response tokens"
        )


def check_example(where: str, example: Example, limits: Limits, ours: bool) -> int:
    """Check an example, and return the number of its tokens that are trained on.

    ``ours`` is False if the user passed a collator. Then only columns that this package knows are
    checked, and the result is 0.

    Raises:
        ValueError: The example lacks a column, or has more tokens than a model has positions. Or a
            token id has no embedding, or a label is not below ``vocab_size``.
    """
    labelled = 0
    if ours:
        example = columns_of(where, model_columns(example))
        labelled = int((example["labels"][1:] != IGNORE_INDEX).sum())
    limits.check(where, example)
    return labelled


def model_columns(example: object) -> Example:
    """Return an example without unknown columns, which the Trainer also removes for collation."""
    if not isinstance(example, Mapping):
        raise TypeError(
            f"an example is a {type(example).__name__}, expected a mapping with input_ids and"
            " labels: convert the examples, or pass a data_collator"
        )
    known = Collator.columns()
    return {k: x for k, x in example.items() if k in known} or example


def _check_ids(where: str, column: str, ids: Tensor, rows: int, positions: int | None) -> None:
    if not ids.numel():
        raise ValueError(f"{where} has no {column}: leave the example out")
    if positions is not None and column != "labels":
        reach = ids.max().item() + 1 if column == "position_ids" else ids.shape[-1]
        if reach > positions:
            raise ValueError(
                f"{where} reaches position {reach}, but a model has only {positions}: set a smaller"
                " max_length, or in inspect a smaller max_tokens"
            )
    if column == "position_ids":
        return
    wrong = ids[(ids >= rows) | (ids < 0)]
    wrong = wrong[wrong != IGNORE_INDEX] if column == "labels" else wrong
    if wrong.numel():
        raise ValueError(
            f"{column} of {where} hold {wrong[0].item()}, but a model has embeddings only for 0 to"
            f" {rows - 1}: use the tokenizer of the models, or resize their embeddings"
        )


def _check_labels(where: str, labels: Tensor, vocab_size: int) -> None:
    beyond = labels[labels >= vocab_size]
    if beyond.numel():
        raise ValueError(
            f"labels of {where} hold {beyond[0].item()}, but vocab_size={vocab_size} leaves out ids"
            f" from {vocab_size} on: leave the example out, or set a larger vocab_size"
        )


def _learnt_positions(model: PreTrainedModel) -> int | None:
    """Return the number of learnt position embeddings, or None if a model learns none."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in last or last == "wpe"):
            return limit
    return None


def check_weights(names: Mapping[str, Tensor], trained: Sequence[str]) -> None:
    """Raise if one of the weights in ``trained`` is not finite."""
    bad = [x for x in trained if x in names and not _is_finite(names[x])]
    if bad:
        raise ValueError(
            f"{len(bad)} trained weights are not finite, such as {bad[0]}, so the model is not"
            " saved: lower learning_rate, or set max_grad_norm"
        )


def _is_finite(weight: Tensor) -> bool:
    with gathered([weight]):  # one weight at a time, because all together may need too much memory
        return bool(weight.isfinite().all())


def check_dtype(student: PreTrainedModel) -> None:
    """Raise if trainable weights of the student are in float16."""
    parameters = student.named_parameters()
    half = [name for name, x in parameters if x.requires_grad and x.dtype == torch.float16]
    if half:
        raise TypeError(
            f"model has {len(half)} trainable parameters in float16, such as {half[0]}, but Adam's"
            " moments underflow in float16: load the model in float32 (fp16=True still computes in"
            " float16) or bfloat16, or train an adapter"
        )


def check_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, args: LensDistillConfig
) -> None:
    """Raise if training would change the teacher, or if an option has no effect with a teacher."""
    held = {id(x) for x in teacher.parameters()}
    shared = [name for name, x in student.named_parameters() if x.requires_grad and id(x) in held]
    if shared:
        raise ValueError(
            f"model and teacher share {len(shared)} parameters, such as {shared[0]}, so training"
            " would change the teacher: pass a separate teacher, such as copy.deepcopy(model)"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no effect with a"
            " teacher: set it to 0, or pass no teacher"
        )


def check_targets(teacher: object, args: LensDistillConfig) -> None:
    """Raise if distillation has neither teacher nor targets, or an option does not suit targets."""
    if teacher is None and args.kd_ratio > 0 and not args.teacher_targets:
        raise ValueError(
            f"kd_ratio={args.kd_ratio} needs a teacher, but teacher is None: give a teacher, or"
            " kd_ratio=0 for fine-tuning without distillation"
        )
    if not args.teacher_targets:
        return
    if teacher is not None and args.num_lens_pairs == 0:
        raise ValueError(
            "teacher_targets replaces the teacher's output, and num_lens_pairs=0 leaves nothing"
            " else to compare: give no teacher, or set a positive num_lens_pairs"
        )
    if teacher is None and (args.num_lens_pairs != 0 or args.mse_coeff or args.teacher_cache):
        raise ValueError(
            "teacher_targets has no hidden states for lens pairs, mse_coeff or teacher_cache: set"
            " num_lens_pairs=0 and leave the others out, or also give a teacher"
        )


def check_distribution(args: LensDistillConfig) -> None:
    """Raise if the loss does not support the parallelism of the run."""
    if args.n_gpu > 1:
        raise RuntimeError(
            f"one process has {args.n_gpu} GPUs, but nn.DataParallel is not supported: start one"
            " process per GPU with torchrun or accelerate launch"
        )
    accelerator = args.accelerator_config
    assert isinstance(accelerator, AcceleratorConfig)  # TrainingArguments converts it
    if args.world_size > 1 and not accelerator.even_batches:
        raise RuntimeError(
            "accelerator_config has even_batches=False, but a process without a batch would"
            " block the others: leave it out, because no row is trained on twice"
        )
    if is_deepspeed_zero3_enabled():
        _check_zero_3(args)
    parallel = getattr(args, "parallelism_config", None)
    for name in ("cp_size", "sp_size", "tp_size"):
        if (size := getattr(parallel, name, 1) or 1) > 1:
            raise RuntimeError(
                f"parallelism_config has {name}={size}, but {SPLIT[name]}: use data parallelism"
                " (DDP, FSDP2 or DeepSpeed)"
            )


def _check_zero_3(args: LensDistillConfig) -> None:
    reason = None
    if args.trains_matrices:
        name, reason = _matrices_of(args), "DeepSpeed would partition its matrices"
    elif args.teacher_cache:
        name = "teacher_cache"
        reason = "one rank fills the cache, and would wait for the others' weights"
    elif args.on_policy:
        name = f"on_policy={args.on_policy}"
        reason = "each rank decides when it samples, and would wait for the others' weights"
    if reason is not None:
        raise RuntimeError(
            f"{name} is not supported with DeepSpeed ZeRO-3, because {reason}: use ZeRO-2, or leave"
            " the option out"
        )


def _matrices_of(args: LensDistillConfig) -> str:
    return f"mse_coeff={args.mse_coeff}" if args.mse_coeff else "train_student_lens=True"


def check_shards(state: AcceleratorState, args: LensDistillConfig) -> None:
    """Raise if the run needs MSE matrices in sharded checkpoints, which is not supported."""
    plugin = getattr(state, "fsdp_plugin", None)
    if args.trains_matrices and plugin is not None and "SHARDED" in str(plugin.state_dict_type):
        raise RuntimeError(
            f"{_matrices_of(args)} needs full checkpoints to save its matrices:"
            " set state_dict_type FULL_STATE_DICT in fsdp_config"
        )
