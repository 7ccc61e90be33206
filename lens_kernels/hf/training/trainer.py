"""Distillation with transformers' Trainer: a subclass with another loss."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from lens_kernels import compat
from lens_kernels.hf.cache.store import TeacherCache
from lens_kernels.hf.model.adapter_base import FOLDER, is_saved, save_base
from lens_kernels.hf.model.loading import load_model
from lens_kernels.hf.model.placement import moved
from lens_kernels.hf.model.state import whole_state
from lens_kernels.hf.training import matrices
from lens_kernels.hf.training.caching import fill_caches
from lens_kernels.hf.training.card import model_card
from lens_kernels.hf.training.checkpoints import folder_to_resume, write_checksums
from lens_kernels.hf.training.checks import (
    check_arguments,
    check_distribution,
    check_dtype,
    check_model,
    check_shards,
    check_targets,
    check_teacher,
    check_weights,
)
from lens_kernels.hf.training.collation import (
    Batch,
    Collator,
    check_batch,
    first_rows,
    padding_id,
    rows_of_last_step,
    tokens_in,
    without_first_label,
)
from lens_kernels.hf.training.config import LensDistillConfig
from lens_kernels.hf.training.console import shorten
from lens_kernels.hf.training.fine_tuning import final_loss, without_teacher
from lens_kernels.hf.training.meter import Meter, Speed
from lens_kernels.hf.training.objective import LensObjective, Outcome
from lens_kernels.hf.training.on_policy import answered
from lens_kernels.hf.training.packing import needs_one_row
from lens_kernels.hf.training.preparation import prepare
from lens_kernels.hf.training.text_files import write_text
from lens_kernels.hf.training.whole_heads import is_partitioned, partition, whole_model
from lens_kernels.inputs import IGNORE_INDEX


class LensDistillTrainer(compat.TrainerHooks, Trainer):
    """Trains the student ``model`` to agree with ``teacher`` in its output and through its lenses.

    Student and teacher are models, or folders of models. A student from a folder is loaded in
    float32, and a teacher in its saved dtype. Datasets hold ``input_ids`` and ``labels``, which are
    -100 for tokens that are not trained on. Instead, datasets may hold records of ``read_rows``,
    which ``processing_class`` tokenises. An ``IterableDataset`` is read during training, and starts
    again at its end. The logs have the terms of the objective in nats per token over all processes
    (see ``Outcome``), and ``tokens_per_second``. With ``teacher_cache``, the teacher runs only once
    over each dataset, before training.

    Raises:
        ValueError: ``kd_ratio`` is positive without a teacher, or layers, models or vocabularies do
            not match, or the teacher cache is stale or damaged.
        TypeError: Trainable weights are in float16.
        RuntimeError: The parallelism is unsupported: DataParallel, context or tensor parallelism,
            or MSE with ZeRO-3 or sharded checkpoints.
    """

    args: LensDistillConfig
    model: PreTrainedModel
    extra_columns = ("example_id",)

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher: PreTrainedModel | str | None,
        args: LensDistillConfig,
        **trainer: Any,
    ) -> None:
        check_targets(teacher, args)
        check_arguments(trainer, teacher)
        check_distribution(args)
        check_model("model", model)
        check_model("teacher", teacher)
        if isinstance(model, str):
            model = load_model(model, "float32")
        if isinstance(teacher, str):
            teacher = load_model(teacher)
        check_dtype(model)
        if teacher is not None:
            check_teacher(model, teacher, args)
        tokenizer = trainer.get("processing_class")
        if trainer.get("data_collator") is None:
            # Without a tokenizer, the padding id is 0. Padding tokens are masked, so any id works.
            pad = 0 if tokenizer is None else padding_id(tokenizer)
            present = [x for x in (model, teacher) if x is not None]
            one_row = args.packing and any(map(needs_one_row, present))
            trainer["data_collator"] = Collator(pad, one_row=one_row)
        models = {"student": model, "teacher": teacher}
        with whole_model(model), whole_model(teacher):  # ZeRO-3 partitions models as they load
            examples = prepare(trainer, models, args)
        super().__init__(model=model, args=args, **trainer)
        # If True, the Trainer passes num_items_in_batch, the number of labels in all accumulated
        # batches. For on-policy answers, which are sampled later, that number is not known.
        self.model_accepts_loss_kwargs = not args.on_policy
        if args.on_policy and self.is_fsdp_enabled:
            raise RuntimeError(
                "on_policy needs the whole student to sample answers: leave FSDP out"
            )
        # The number of processes whose labels num_items_in_batch counts.
        self._sharing = self.accelerator.num_processes if args.average_tokens_across_devices else 1
        self._meter, self._eval_meter, self._speed = Meter(), Meter(), Speed()
        self._labelled: Tensor | None = None
        self._base_is_new = hasattr(model, "peft_config") and not is_saved(model)
        self._saved_bases: set[Path] = set()
        self._optimizer_given = (trainer.get("optimizers") or (None,))[0] is not None
        shorten(self)
        # Facts for the model card. The command ``train`` adds its data and its command line.
        self.facts: dict[str, Any] = {
            k: getattr(x.config, "name_or_path", "") for k, x in models.items() if x is not None
        }
        self.lens_objective: LensObjective | None = None
        self._caches: dict[str, TeacherCache] = {}
        self._loss_only = False
        self._own_loss, self._targets = without_teacher(model, teacher, args, examples, tokenizer)
        if teacher is not None:
            check_shards(self.accelerator.state, args)
            # Under FSDP, accelerate does not move the teacher to the device.
            if getattr(teacher, "hf_device_map", None) is None:
                moved(teacher, args.device)
            # The MSE loss's matrices are random, so create them after super() has set the seed.
            options = args.objective_options()
            with whole_model(model), whole_model(teacher):
                layers = args.layers(model, teacher)
                self.lens_objective = LensObjective(model, teacher, *layers, **options)
            if args.teacher_cache:
                self._caches = fill_caches(self, self.lens_objective, examples)
            elif is_deepspeed_zero3_enabled():
                self._teacher_engine = partition(teacher)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as the Trainer does, with checks of the checkpoint and of the trained weights.

        ``resume_from_checkpoint`` is the folder of a checkpoint, or True for the last complete
        checkpoint in ``output_dir``.

        Raises:
            ValueError: There is no checkpoint, one of its files is missing or cannot be read, no
                label was trained on, or trained weights are not finite.
        """
        projections = self.lens_objective is not None and self.args.trains_matrices
        output = Path(str(self.args.output_dir))
        checkpoint = folder_to_resume(
            resume_from_checkpoint, output, self.args.world_size, projections
        )
        self._meter, self._labelled = Meter(), None
        self._speed.restart()
        compat.forget_preparation(self.model)
        self._check_optimizer()
        objective = self.lens_objective
        with nullcontext() if objective is None else objective.student_with_projections():
            result = super().train(checkpoint, *args, **kwargs)
        if self._labelled is not None and not self._sum_over_processes(self._labelled):
            raise ValueError(
                "no step had a token with a label, so nothing was learnt: set the labels of the"
                f" response tokens to their ids, and all other labels to {IGNORE_INDEX}"
            )
        check_weights(dict(self.model.named_parameters()), self._trained())
        return result

    def _trained(self) -> list[str]:
        return [name for name, x in self.model.named_parameters() if x.requires_grad]

    def _check_optimizer(self) -> None:
        if self.lens_objective is None or not self._optimizer_given:
            return
        assert self.optimizer is not None
        held = {id(x) for group in self.optimizer.param_groups for x in group["params"]}
        if any(id(x) not in held for x in self.lens_objective.projections.parameters()):
            raise ValueError(
                "the optimizer lacks the matrices of mse_coeff or train_student_lens: call"
                " trainer.optimizer.add_param_group({'params':"
                " list(trainer.lens_objective.projections.parameters())}) before train()"
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """Return the batches of a step, and the number of labels in them."""
        # The Trainer checks only after a step whether training ends. So a run that resumes after
        # its last step, within an epoch, would take one more step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        # To fill batches, accelerate repeats rows, which must not be trained on or counted twice.
        # No loss uses the first label of a row, but some versions of transformers count it.
        batches = (without_first_label(self._without_repeats(x, True)) for x in epoch_iterator)
        return super().get_batch_samples(batches, num_batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the objective, divided by ``num_items_in_batch`` or by the batch's labels."""
        if self.lens_objective is None:
            return self._fine_tune(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            if self.args.on_policy and model.training and random.random() < self.args.on_policy:
                # padding tokens are masked, so any id works
                pad = getattr(self.data_collator, "pad_token_id", 0)
                inputs = answered(self.model, inputs, pad, self.args.max_length)
            name = "train" if model.training else "eval"
            stored = {"cache": self._caches.get(name), "targets": self._targets.get(name)}
            outcome = self.lens_objective(inputs, num_items_in_batch, model, **stored)
        self._record(model, inputs, outcome)
        loss = outcome.loss
        if num_items_in_batch is not None:
            loss = loss * self._sharing  # because processes average their gradients
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log ``logs``, the objective's mean terms since the last training log, and the speed."""
        if "loss" in logs:
            means = self._meter.means(self._sum_over_processes)
            loss = means.pop("loss", 0.0)
            # With fp16, overflows are normal: the gradient scaler skips steps with an overflow.
            if not math.isfinite(loss) and self.accelerator.mixed_precision != "fp16":
                raise ValueError(
                    f"the loss is {loss} at step {self.state.global_step}, so training cannot"
                    " continue: lower learning_rate, or check the weights of model and teacher"
                )
            # Keep the entry "loss", which the Trainer computes as a mean over steps.
            logs |= means | {"tokens_per_second": self._speed.read(self._sum_over_processes)}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the Trainer does, and add the means of the loss terms over all tokens."""
        self._eval_meter = Meter()
        with self._speed.paused():
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._eval_meter.means(self._sum_over_processes)
        parts = {f"{prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **parts})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluate a batch without the rows that accelerate repeats to fill the batch."""
        self._loss_only = prediction_loss_only
        inputs = self._without_repeats(inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the objective on ``eval_dataset``, by default the trainer's own dataset."""
        self._check_cached(eval_dataset is None or eval_dataset is self.eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Return the data loader for ``predict``. Raise if no teacher cache has these examples."""
        self._check_cached(test_dataset is self.eval_dataset)
        return super().get_test_dataloader(test_dataset)

    def _check_cached(self, own: bool) -> None:
        if (self._caches or self._targets) and not own:
            raise ValueError(
                "with teacher_cache, teacher states exist only for the trainer's own eval_dataset:"
                " pass the data as eval_dataset when you create the trainer"
            )

    def _without_repeats(self, inputs: Batch, training: bool = False) -> Batch:
        # To fill batches, accelerate repeats rows. ``remainder`` is the number of other rows in the
        # last batches of all processes, in rank order.
        check_batch(inputs)
        state, remainder = self.accelerator.gradient_state, 0
        if state.end_of_dataloader:
            # After a resume within an epoch, accelerate does not know the number of rows in the
            # last step.
            own = (self.train_dataset, self.args, self.batch_size)
            remainder = rows_of_last_step(*own) if training else state.remainder
        if remainder <= 0:
            return inputs
        before = self.accelerator.process_index * len(inputs["labels"])
        return first_rows(inputs, max(0, remainder - before))

    def _fine_tune(
        self, model: nn.Module, inputs: Batch, return_outputs: bool, items: Tensor | int | None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        check_batch(inputs)
        if not self._own_loss and (self._loss_only or not return_outputs):
            cache = self._targets.get("train" if model.training else "eval")
            with self.accelerator.autocast():
                outcome = final_loss(self.model, inputs, items, model, self.args, cache)
            self._record(model, inputs, outcome)
            loss = outcome.loss if items is None else outcome.loss * self._sharing
            return (loss, {"loss": loss}) if return_outputs else loss
        if items is not None:
            items = torch.as_tensor(items).clamp(min=1)  # prevents 0 / 0

        # Copy the inputs, because label smoothing removes the labels from them.
        given: dict[str, Tensor | bool] = dict(inputs)
        if self.args.packing:
            given["use_cache"] = False  # with a cache, models would mix packed examples
        result = super().compute_loss(model, given, return_outputs, items)
        loss = (result[0] if isinstance(result, tuple) else result).detach()
        count = (inputs["labels"][..., 1:] != -100).sum()
        total = loss * (count if items is None else items / self._sharing)
        total = torch.where(count == 0, 0.0, total)  # transformers may have divided by 0
        self._record(model, inputs, Outcome(loss, {"loss": total, "ce": total}, count))
        return result

    def _record(self, model: nn.Module, inputs: Batch, outcome: Outcome) -> None:
        if not model.training:
            self._eval_meter.add(outcome)
            return
        self._meter.add(outcome)
        tokens = outcome.num_tokens.detach()
        self._labelled = tokens if self._labelled is None else self._labelled + tokens
        self._speed.add(tokens_in(inputs))

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.args.device), "sum")

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write the model card ``README.md`` to ``output_dir``. All arguments are ignored."""
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "README.md", str(model_card(self, self.facts)))

    def write_model(self, output_dir: str | None, state_dict: dict[str, Tensor] | None) -> None:
        """Write the student, and in a separate file the MSE loss's matrices, to ``output_dir``."""
        held = self.model.state_dict() if state_dict is None else state_dict
        check_weights(held, self._trained())
        folder = Path(output_dir or str(self.args.output_dir))
        self._save_base(folder, held)
        learnt = {name: x for name, x in held.items() if f"{matrices.PROJECTIONS}." in name}
        if not learnt:
            super().write_model(output_dir, state_dict)
            return
        super().write_model(output_dir, {name: x for name, x in held.items() if name not in learnt})
        if self.args.should_save:
            own = {name.rpartition(f"{matrices.PROJECTIONS}.")[2]: x for name, x in learnt.items()}
            matrices.save(own, folder)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the student as the Trainer does, and an adapter's base model if no files hold it."""
        if is_partitioned(self.model):  # all ranks gather weights, but only rank 0 writes files
            self._save_base(Path(output_dir or str(self.args.output_dir)), None)
        super().save_model(output_dir, *args, **kwargs)

    def _save_base(self, folder: Path, held: dict[str, Tensor] | None) -> None:
        """Save an adapter's base model once. Without a state dict, all ranks gather its weights."""
        if not self._base_is_new:
            return
        output, folder = Path(str(self.args.output_dir)).absolute(), folder.absolute()
        place = (output if folder.parent == output else folder) / FOLDER
        if place not in self._saved_bases:
            self._saved_bases.add(place)
            held = held or whole_state(self.model, keep=self.args.should_save)
            if self.args.should_save:
                place.parent.mkdir(parents=True, exist_ok=True)
                save_base(self.model, held, place)
        for config in self.model.peft_config.values():
            config.base_model_name_or_path = str(place)

    def after_saving(self, checkpoint: Path) -> None:
        """Write the checksums of a checkpoint's files, by which a resume finds damage."""
        if self.args.should_save:
            write_checksums(checkpoint)

    def after_loading(self, checkpoint: str) -> None:
        """Load the MSE loss's matrices of a checkpoint whose weights were just loaded."""
        if self.lens_objective is not None and len(self.lens_objective.projections):
            matrices.load(self.lens_objective.projections, Path(checkpoint))
