"""DistillLens on transformers' Trainer, which does everything but the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainingArguments

from lens_kernels.functional import DistillationOutput
from lens_kernels.hf.families import blocks_of
from lens_kernels.hf.layers import uniform_layers
from lens_kernels.hf.objective import LensObjective


@dataclass
class LensDistillConfig(TrainingArguments):
    """``TrainingArguments`` and the options of the objective; the defaults are the paper's."""

    student_layers: list[int] | None = field(
        default=None, metadata={"help": "Depths of the student's lenses; default: evenly spread."}
    )
    teacher_layers: list[int] | None = field(
        default=None, metadata={"help": "Depths of the teacher's lenses; default: evenly spread."}
    )
    num_lens_pairs: int = field(
        default=4, metadata={"help": "Number of lens pairs where no depths are given; 0 for none."}
    )
    lens_divergence: str = field(default="jsd", metadata={"help": "Divergence of the lens pairs."})
    final_divergence: str = field(
        default="reverse_kl", metadata={"help": "Divergence of the final outputs."}
    )
    beta: float = field(default=0.5, metadata={"help": "Weight of the teacher in jsd."})
    distill_temperature: float = field(
        default=1.0, metadata={"help": "Divides both models' logits in every divergence."}
    )
    kd_ratio: float = field(
        default=1.0, metadata={"help": "Weight of distillation against cross entropy."}
    )
    lens_coeff: float = field(default=1.0, metadata={"help": "Weight of the lens term."})

    def layers(self, student: Any, teacher: Any) -> tuple[list[int], list[int]]:
        """Return the depths of student and teacher that are compared."""
        given = self.student_layers, self.teacher_layers
        if given[0] is not None and given[1] is not None:
            return given[0], given[1]
        if given != (None, None):
            raise ValueError(
                "give student_layers and teacher_layers together, or neither:"
                f" got {given[0]} and {given[1]}"
            )
        if self.num_lens_pairs == 0:
            return [], []
        student_layers, teacher_layers = (
            uniform_layers(self.num_lens_pairs, len(blocks_of(m))) for m in (student, teacher)
        )
        return student_layers, teacher_layers


class LensDistillTrainer(Trainer):
    """Trains ``model`` to agree with ``teacher`` in its output and through its lenses.

    Datasets hold ``input_ids`` and ``labels``, -100 where a token is not to be learnt from.
    """

    def __init__(self, model: Any, teacher: Any, args: LensDistillConfig, **trainer: Any) -> None:
        teacher.requires_grad_(False)
        teacher.eval()
        student_layers, teacher_layers = args.layers(model, teacher)
        self.objective: LensObjective = LensObjective(
            model,
            teacher,
            student_layers,
            teacher_layers,
            divergence=args.lens_divergence,
            final_divergence=args.final_divergence,
            beta=args.beta,
            temperature=args.distill_temperature,
            kd_ratio=args.kd_ratio,
            lens_coeff=args.lens_coeff,
        )
        self._sums: dict[str, Tensor] = {}
        super().__init__(model=model, args=args, **trainer)
        # The loss is divided by the tokens of the whole accumulated batch, whatever the model does.
        self.model_accepts_loss_kwargs = True
        self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the objective, divided by the tokens of the global batch where they are known."""
        output = self.objective(inputs, denominator=num_items_in_batch, student_call=model)
        if model.training:
            self._remember(output, num_items_in_batch)
        loss = output.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes; the denominator counts the tokens of all of
            # them.
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the objective since the last log, in nats per token of this process."""
        if "loss" in logs and self._sums:
            tokens = self._sums.pop("tokens")
            logs |= {name: (value / tokens).item() for name, value in self._sums.items()}
            self._sums = {}
        super().log(logs, *args, **kwargs)

    def _remember(self, output: DistillationOutput, denominator: Tensor | int | None) -> None:
        """Add up this micro-batch's parts as sums over tokens, without waiting for the device."""
        parts = {"ce": output.ce, "kd": output.kd, "lens": output.lens}
        layers = self.objective.student_layers
        parts |= {f"lens_{i}": x for i, x in zip(layers, output.per_layer, strict=True)}
        divided_by = output.num_tokens if denominator is None else denominator
        sums = {name: x * divided_by for name, x in parts.items() if x is not None}
        for name, value in {**sums, "tokens": output.num_tokens}.items():
            self._sums[name] = self._sums.get(name, 0) + value
