"""The DistillLens objective, which compares the hidden states of student and teacher on a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lens_kernels.functional import DistillationOutput, distillation_loss
from lens_kernels.hf.cache.store import TeacherCache
from lens_kernels.hf.cache.targets import TargetCache
from lens_kernels.hf.model.anatomy import blocks_of, lens_head_from, verify_lens
from lens_kernels.hf.model.capture import hidden_states
from lens_kernels.hf.model.families import causal_lm_of, input_embeddings
from lens_kernels.hf.model.layers import check_layers, lens_layers
from lens_kernels.hf.model.placement import moved
from lens_kernels.hf.model.state import replaced_forward
from lens_kernels.hf.training.collation import check_batch, example_numbers, targets_of
from lens_kernels.hf.training.entropy import entropy_sum
from lens_kernels.hf.training.matrices import PROJECTIONS, mean_squares, new_matrices
from lens_kernels.hf.training.translators import of_layers, trainable, translated
from lens_kernels.hf.training.whole_heads import (
    inside_call,
    where_head_is_whole,
    whole_head,
    whole_model,
)
from lens_kernels.inputs import IGNORE_INDEX
from lens_kernels.lens import LensHead
from lens_kernels.options import DistillationOptions, workspace_or_default
from lens_kernels.sharding import shared_vocabulary
from lens_kernels.targets import SparseTargets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Outcome:
    """The objective on one batch.

    Attributes:
        loss: The loss in nats per token, a differentiable scalar.
        sums: Detached sums over the ``num_tokens`` tokens, in nats: ``loss`` and its unweighted
            terms ``ce``, ``kd``, ``lens``, ``lens_<student depth>`` and ``mse``.
            ``entropy_student_<depth>`` and ``entropy_teacher_<depth>`` estimate the entropies at
            each lens depth and at ``final``. In training with ``grad_threshold``, the mean of
            ``dropped`` is the share of the gradient that was left out. With ``token_clip``, the
            mean of ``clipped`` is the share of token divergences above ``token_clip``.
        num_tokens: Number of tokens with a label.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    num_tokens: Tensor

    @property
    def metrics(self) -> dict[str, float]:
        """Return ``sums`` divided by the batch's number of labels, as Python numbers."""
        sums = torch.stack([x.double() for x in self.sums.values()])
        return dict(zip(self.sums, (sums / self.num_tokens.clamp(min=1)).tolist(), strict=True))


class LensObjective(nn.Module):
    """Runs student and teacher on a batch, and compares their hidden states.

    The objective is a module that contains the student and ``projections``, but not the teacher. So
    optimizers, wrappers and checkpoints find only the trained parameters. The teacher is frozen,
    set to evaluation mode, and moved to the device of the batch.

    The models' heads do not run, so no full logits are stored. As in Hugging Face models, labels
    have the positions of their own tokens, and are shifted here.

    Args:
        student: A causal language model that has a lens, or a peft model of one.
        teacher: Another such model, with the same tokenizer.
        student_layers: Blocks of the student whose outputs are compared (1 is the first).
        teacher_layers: Blocks of the teacher. The output of ``student_layers[i]`` is compared with
            that of ``teacher_layers[i]``.
        lens_norm: Apply each model's final norm to intermediate hidden states.
        mse_coeff: Weight of the mean square of ``P h_teacher - h_student``, with a learnt matrix
            ``P`` in ``projections`` for each pair.
        student_lens: File of translators of the student's layers, as ``tune-lens`` writes it, or
            None. Translators move hidden states before the lens reads them.
        teacher_lens: The same for the teacher. Its translators are never trained.
        train_student_lens: Train the student's translators along. Without a file they start as
            zeros, which leave hidden states as they are. They are in ``projections`` too.
        **options: Options of ``distillation_loss``.

    Raises:
        ValueError: The layers do not pair up or do not exist, or an option is out of range.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        student_layers: Sequence[int],
        teacher_layers: Sequence[int],
        *,
        lens_norm: bool = True,
        mse_coeff: float = 0.0,
        student_lens: str | None = None,
        teacher_lens: str | None = None,
        train_student_lens: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if len(student_layers) != len(teacher_layers):
            raise ValueError(
                "student_layers and teacher_layers must pair up:"
                f" got {list(student_layers)} and {list(teacher_layers)}"
            )
        self.student = student
        teacher.requires_grad_(False)
        teacher.eval()
        # Inside a tuple, the teacher is not a submodule.
        self._teacher: tuple[PreTrainedModel | None] = (teacher,)
        self._teacher_head: LensHead | None = None
        self.lens_norm, self.mse_coeff = lens_norm, mse_coeff
        self.options = DistillationOptions(**options)
        with whole_model(student), whole_model(teacher):
            self.student_layers = check_layers(
                "student_layers", list(student_layers), len(blocks_of(student))
            )
            self.teacher_layers = check_layers(
                "teacher_layers", list(teacher_layers), len(blocks_of(teacher))
            )
            check_own_loss(student)
            for model in (student, teacher):
                verify_lens(model)
            (head, other), layers = self.heads(), self.student_layers
            sizes = {"student_head": len(head.weight), "teacher_head": len(other.weight)}
            shared_vocabulary(self.options.vocab_size, sizes)
            self.projections = nn.ModuleList()
            if mse_coeff:
                self.projections = new_matrices(head.weight, other.weight, len(layers))
            ours = of_layers("student_lens", student_lens, layers, head)
            self._teacher_lens = of_layers("teacher_lens", teacher_lens, self.teacher_layers, other)
            if train_student_lens:
                ours = trainable(ours, len(layers), head)
                self.projections.extend(ours)
            # In a tuple, so that trained translators are registered only once.
            self._student_lens = (ours,)

    @classmethod
    def from_models(
        cls,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        num_lens_pairs: int | None = None,
        *,
        student_layers: list[int] | None = None,
        teacher_layers: list[int] | None = None,
        **options: Any,
    ) -> LensObjective:
        """Return the objective of two models. By default, its lens pairs are evenly spaced.

        The default of ``num_lens_pairs`` is 4, or less if a model has fewer than 5 blocks. Lists
        of layers replace it. ``options`` are other arguments of the class. ``objective(batch)``
        returns an ``Outcome``::

            objective = LensObjective.from_models(student, teacher, divergence="forward_kl")
            outcome = objective(batch)  # input_ids, labels, attention_mask
            outcome.loss.backward()
            print(outcome.metrics)
        """
        if isinstance(teacher, (list, tuple)):
            raise TypeError(
                f"teacher must be one model, got {len(teacher)}: for several teachers, add the"
                " weighted losses of a LensObjective for each"
            )
        blocks = len(blocks_of(student)), len(blocks_of(teacher))
        layers = lens_layers(*blocks, num_lens_pairs, student_layers, teacher_layers)
        return cls(student, teacher, *layers, **options)

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The teacher, or None after ``release_teacher``."""
        return self._teacher[0]

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        denominator: Tensor | float | None = None,
        student_call: nn.Module | None = None,
        cache: TeacherCache | None = None,
        targets: TargetCache | None = None,
    ) -> Outcome:
        """Return the objective of a batch.

        Args:
            inputs: ``input_ids`` and ``labels``, both ``(B, T)``, and other model inputs such as
                ``attention_mask``. Labels are -100 for tokens that are not trained on.
            denominator: Number of labels by which the loss is divided, such as that of the global
                batch; by default that of this batch.
            student_call: The student inside its distributed wrapper, called instead of the student.
            cache: A cache with the teacher's hidden states. They are read for each ``example_id``
                of the batch, and the teacher does not run.
            targets: A cache of sparse targets, which replace the teacher's output.
        """
        check_batch(inputs)
        inputs = dict(inputs)
        example_ids = inputs.pop("example_id", None)
        labels = inputs.pop("labels")
        shifted = torch.full_like(labels, IGNORE_INDEX)
        shifted[..., :-1] = labels[..., 1:]
        counted = (shifted.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        if cache is None:
            teacher_rows = self.teacher_rows(inputs, counted)
        else:
            teacher_rows = self._cached_rows(cache, example_ids, counted)
        teacher_final: Tensor | SparseTargets = teacher_rows[-1]
        if targets is not None:
            teacher_final = targets_of(targets, example_ids, len(counted), counted.device)
        outcomes = []

        def compare(*student_rows: Tensor) -> Tensor:
            next_tokens = shifted.flatten()[counted]
            with nullcontext() if self.teacher is None else whole_head(self.teacher):
                outcome = self._compare(
                    list(student_rows), teacher_rows, teacher_final, next_tokens, denominator
                )
            outcomes.append(outcome)
            return outcome.loss

        def forward(**received: Tensor) -> dict[str, Tensor]:
            given = {name: received[name] for name in inputs}
            hidden, final = hidden_states(self.student, self.student_layers, given)
            student_rows = [_select(x, counted) for x in [*hidden, final]]
            return {"loss": where_head_is_whole(self.student, compare)(*student_rows)}

        with replaced_forward(causal_lm_of(self.student), forward):
            called = self.student if student_call is None else student_call
            loss = called(**inputs)["loss"]
        # The wrapper may have attached gradient hooks to its own loss, so its loss must be
        # returned.
        return replace(outcomes[0], loss=loss)

    @torch.no_grad()
    def teacher_rows(self, inputs: Mapping[str, Tensor], counted: Tensor) -> list[Tensor]:
        """Return the teacher's hidden states on ``inputs``, at the flat positions ``counted``.

        The result has a tensor ``(len(counted), D)`` for each lens layer, and one for the final
        states.
        """
        assert self.teacher is not None
        device = inputs["input_ids"].device
        if getattr(self.teacher, "hf_device_map", None) is None and self.teacher.device != device:
            moved(self.teacher, device)
        # The devices of a teacher with a device map may differ from the student's device.
        own = input_embeddings(self.teacher).device
        if own.type != "meta":  # accelerate moves the inputs of offloaded embeddings
            inputs = {k: x.to(own) if isinstance(x, Tensor) else x for k, x in inputs.items()}
        hidden, final = inside_call(self.teacher, self.teacher_layers, inputs)
        return [_select(x, counted).to(device) for x in [*hidden, final]]

    @contextmanager
    def student_with_projections(self) -> Iterator[None]:
        """Make the MSE loss's matrices a part of the student, so that optimizers find them."""
        holder = causal_lm_of(self.student)
        try:
            if len(self.projections):
                holder.add_module(PROJECTIONS, self.projections)
            yield
        finally:
            if hasattr(holder, PROJECTIONS):
                delattr(holder, PROJECTIONS)

    def release_teacher(self) -> None:
        """Drop the teacher except its head. Call this once all teacher states are cached."""
        assert self.teacher is not None
        with whole_head(self.teacher) as sharded:
            head = self._whole_teacher_head()
            self._teacher_head = head.map(torch.clone) if sharded else head
        self._teacher = (None,)

    def heads(self) -> tuple[LensHead, LensHead]:
        """Return the lens heads of student and teacher."""
        heads = lens_head_from(self.student), self._whole_teacher_head()
        if self.lens_norm:
            return heads
        return replace(heads[0], norm=None), replace(heads[1], norm=None)

    def _whole_teacher_head(self) -> LensHead:
        if self.teacher is not None:
            head = lens_head_from(self.teacher)
            if getattr(self.teacher, "hf_device_map", None) is None:
                return head
            # A teacher with a device map is never moved, so its head is copied to the student's
            # device once.
            device, known = lens_head_from(self.student).weight.device, self._teacher_head
            if known is None or known.weight.device != device:
                self._teacher_head = head.map(lambda x: x.to(device))
        assert self._teacher_head is not None
        return self._teacher_head

    def _compare(
        self,
        student_rows: list[Tensor],
        teacher_rows: list[Tensor],
        teacher_final: Tensor | SparseTargets,
        labels: Tensor,
        denominator: Tensor | float | None,
    ) -> Outcome:
        # Skip the lens pairs if their weight is 0.
        weight = self.options.kd_ratio * self.options.lens_coeff
        untranslated = student_rows[:-1], teacher_rows[:-1]
        student_rows = translated(self._student_lens[0], student_rows)
        teacher_rows = translated(self._teacher_lens, teacher_rows)
        lenses = len(self.student_layers) if weight else 0
        student_head, teacher_head = self.heads()
        unused = isinstance(teacher_final, SparseTargets) and not lenses
        output = distillation_loss(
            student_rows[:lenses],
            teacher_rows[:lenses],
            student_head,
            None if unused else teacher_head,
            student_final=student_rows[-1],
            teacher_final=teacher_final,
            labels=labels,
            denominator=denominator,
            **vars(self.options),
        )
        tokens = torch.as_tensor(output.num_tokens if denominator is None else denominator)
        tokens = torch.where(tokens == 0, 1, tokens)  # prevents 0 / 0
        loss, parts = output.loss, _parts(output, self.student_layers[:lenses])
        if self.mse_coeff:
            mse = mean_squares(self.projections, *untranslated) / tokens
            loss = loss + self.options.kd_ratio * self.mse_coeff * mse
            parts["mse"] = mse
        parts["loss"] = loss
        sums = {name: x.detach() * tokens for name, x in parts.items()}
        if self.options.grad_threshold is not None and loss.requires_grad:
            sums["dropped"] = output.dropped * output.num_tokens
        if self.options.token_clip is not None:
            sums["clipped"] = output.clipped * output.num_tokens
        sums |= self._entropies("student", self.student_layers, student_rows)
        sums |= self._entropies("teacher", self.teacher_layers, teacher_rows)
        return Outcome(loss, sums, output.num_tokens)

    def _entropies(self, side: str, layers: Sequence[int], rows: list[Tensor]) -> dict[str, Tensor]:
        is_teacher = side == "teacher"
        whole, temperature = self.heads()[is_teacher], self.options.temperature
        if is_teacher and self.options.teacher_temperature is not None:
            temperature = self.options.teacher_temperature
        head = whole.prefix(self.options.vocab_size or len(whole.weight))
        final = replace(head, norm=None)  # the final states already have the norm
        workspace = workspace_or_default(self.options.workspace_bytes, head.weight.device)
        return {
            f"entropy_{side}_{depth}": entropy_sum(x, lens, temperature, workspace)
            for depth, x, lens in zip(
                [*layers, "final"], rows, [head] * len(layers) + [final], strict=True
            )
        }

    def _cached_rows(
        self, cache: TeacherCache, example_ids: Tensor | None, counted: Tensor
    ) -> list[Tensor]:
        if example_ids is None:
            raise ValueError(
                "the teacher cache needs example_id in the batch, got none: add it to the dataset"
            )
        rows = cache.rows(example_numbers(example_ids))
        names = [f"layer_{depth}" for depth in self.teacher_layers] + ["final"]
        if len(rows["final"]) != len(counted):
            raise ValueError(
                f"the teacher cache has {len(rows['final'])} tokens for this batch, expected"
                f" {len(counted)}: example_id must hold the positions of the batch's examples in"
                " the dataset"
            )
        weight = self._whole_teacher_head().weight
        return [rows[name].to(weight.device, weight.dtype) for name in names]


def check_own_loss(student: PreTrainedModel) -> None:
    """Raise if the student's own loss has a router term, which distillation would ignore."""
    config = student.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "the student's config has output_router_logits=True, which adds a router loss, but"
            " distillation has no router loss: set model.config.output_router_logits = False to"
            " train without it"
        )


def _select(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.flatten(0, -2).index_select(0, index.to(hidden.device))


def _parts(output: DistillationOutput, depths: Sequence[int]) -> dict[str, Tensor]:
    parts = {"ce": output.ce, "kd": output.kd, "lens": output.lens}
    parts |= {f"lens_{i}": x for i, x in zip(depths, output.per_layer, strict=True)}
    return {name: x for name, x in parts.items() if x is not None}
