"""The DistillLens objective of two models on a batch of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lens_kernels.functional import DistillationOutput, distillation_loss
from lens_kernels.hf.capture import Captured, capture
from lens_kernels.hf.families import blocks_of, lens_head_from, verify_lens_head
from lens_kernels.hf.layers import check_layers
from lens_kernels.validation import IGNORE_INDEX


class LensObjective:
    """Runs student and teacher on a batch and compares them; neither computes logits.

    ``student_layers[i]`` is compared with ``teacher_layers[i]``; ``options`` go to
    ``distillation_loss``. Labels are Hugging Face's: aligned with the input, shifted here.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        student_layers: Sequence[int],
        teacher_layers: Sequence[int],
        **options: Any,
    ) -> None:
        if len(student_layers) != len(teacher_layers):
            raise ValueError(
                "student_layers and teacher_layers must pair up:"
                f" got {list(student_layers)} and {list(teacher_layers)}"
            )
        self.student, self.teacher = student, teacher
        self.student_layers = check_layers(
            "student_layers", list(student_layers), len(blocks_of(student))
        )
        self.teacher_layers = check_layers(
            "teacher_layers", list(teacher_layers), len(blocks_of(teacher))
        )
        self.options = options
        for model in (student, teacher):
            _verify(model)

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        denominator: Tensor | float | None = None,
        student_call: nn.Module | None = None,
    ) -> DistillationOutput:
        """Return the objective of a batch of ``input_ids``, ``labels`` and other model inputs.

        ``student_call`` is the student as a distributed wrapper holds it, to be called in its
        place.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        shifted = torch.full_like(labels, IGNORE_INDEX)
        shifted[..., :-1] = labels[..., 1:]
        with torch.no_grad():
            teacher = _run(self.teacher, self.teacher, self.teacher_layers, inputs)
        student = _run(student_call or self.student, self.student, self.student_layers, inputs)
        assert student.final is not None and teacher.final is not None
        return distillation_loss(
            [student.hidden[i] for i in self.student_layers],
            [teacher.hidden[i] for i in self.teacher_layers],
            lens_head_from(self.student),
            lens_head_from(self.teacher),
            student_final=student.final,
            teacher_final=teacher.final,
            labels=shifted,
            denominator=denominator,
            **self.options,
        )


def _run(call: nn.Module, model: Any, layers: Sequence[int], inputs: Mapping[str, Any]) -> Captured:
    with capture(model, layers) as captured:
        # One position's logits are computed and thrown away: the forward has no way to skip them.
        call(**inputs, use_cache=False, logits_to_keep=1)
    return captured


def _verify(model: Any) -> None:
    """Compare the lens with the model's own logits on a few tokens, before any work."""
    blocks = blocks_of(model)
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(4, device=device)[None] % model.config.vocab_size
    training = model.training
    model.eval()
    with torch.no_grad(), capture(model, [len(blocks)]) as captured:
        logits = model(tokens, use_cache=False).logits
    model.train(training)
    verify_lens_head(model, lens_head_from(model), captured.hidden[len(blocks)], logits)
