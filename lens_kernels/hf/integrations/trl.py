"""TRL's trainers with the lens objective as their loss. This module needs ``trl`` 1.16.

TRL still prepares the data, generates answers, trains and logs. Only the loss is replaced. The full
logits of student and teacher are never stored.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import DistillationTrainer, SFTTrainer
from trl.experimental.gkd import GKDTrainer

from lens_kernels.hf.training.meter import Meter
from lens_kernels.hf.training.objective import LensObjective
from lens_kernels.inputs import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LensLoss:
    """Replaces the loss of a TRL trainer. ``lens`` are arguments of ``LensObjective.from_models``.

    The terms of the objective are logged in nats per token, over all processes.
    """

    accelerator: Accelerator
    args: TrainingArguments
    model: Any
    teacher_model: PreTrainedModel
    lens_objective: LensObjective

    def __init__(self, *args: Any, lens: dict[str, Any] | None = None, **trainer: Any) -> None:
        super().__init__(*args, **trainer)
        models = (self.accelerator.unwrap_model(x) for x in (self.model, self.teacher_model))
        self._meters = {True: Meter(), False: Meter()}  # one Meter for training, one for evaluation
        self.lens_objective = LensObjective.from_models(*models, **(lens or {}))

    def batch(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the model inputs and labels of a batch from TRL."""
        extra = {"prompts", "prompt_attention_mask", "num_items_in_batch"}
        return {name: x for name, x in inputs.items() if name not in extra}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the objective, divided by TRL's count of tokens, or by the batch's labels."""
        items = inputs.get("num_items_in_batch", num_items_in_batch)
        # Processes average their gradients, so each process divides by its share of the tokens.
        sharing = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        denominator = None if items is None else torch.as_tensor(items).clamp(min=1) / sharing
        outcome = self.lens_objective(self.batch(inputs), denominator, student_call=model)
        self._meters[self.model.training].add(outcome)
        return (outcome.loss, {"loss": outcome.loss}) if return_outputs else outcome.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log ``logs`` and the mean terms of the objective since the last log."""
        prefix = "" if self.model.training else "eval_"
        means = self._meters[self.model.training].means(
            partial(self.accelerator.reduce, reduction="sum")
        )
        means.pop("loss", None)  # TRL logs the loss itself
        host: Any = super()
        host.log(logs | {prefix + name: x for name, x in means.items()}, *args, **kwargs)


class LensSFTTrainer(LensLoss, SFTTrainer):
    """``SFTTrainer`` with a teacher model, for distillation on the answers in the data.

    ``teacher_model`` is a model. The other arguments are ``lens`` (see ``LensLoss``) and those of
    ``SFTTrainer``.

    Raises:
        ValueError: A model has no lens, or an entry of ``lens`` is out of range.
    """

    def __init__(
        self, model: PreTrainedModel, teacher_model: PreTrainedModel, *args: Any, **trainer: Any
    ) -> None:
        self.teacher_model = teacher_model
        super().__init__(model, *args, **trainer)


class LensGKDTrainer(LensLoss, GKDTrainer):
    """``GKDTrainer`` with the lens objective as its loss.

    With probability ``lmbda``, the student generates the answers of a batch. The arguments are
    ``lens`` (see ``LensLoss``) and those of ``GKDTrainer``.

    Raises:
        ValueError: A model has no lens, or an entry of ``lens`` is out of range.
    """

    def __init__(self, *args: Any, **trainer: Any) -> None:
        super().__init__(*args, **trainer)
        # TRL counts the tokens before the answers are generated, so its count is wrong. With False,
        # TRL passes no count, and the loss is the mean over the batch's tokens.
        self.model_accepts_loss_kwargs = False


class LensDistillationTrainer(LensLoss, DistillationTrainer):
    """``DistillationTrainer`` with the lens objective as its loss.

    The student generates the answers of each batch. The arguments are ``lens`` (see ``LensLoss``)
    and those of ``DistillationTrainer``.

    Raises:
        ValueError: A model has no lens, or an entry of ``lens`` is out of range.
    """

    def batch(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Join prompts and answers. Only answers have labels, except for outputs of tools."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        counted = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        counted = torch.cat([torch.zeros_like(inputs["prompt_mask"]), counted], 1).bool()
        labels = ids.where(counted, IGNORE_INDEX)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
