"""The tensors of a public call: checked together, counted, and made into a LossCall."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lens_kernels import adaptive, dispatch
from lens_kernels import validation as check
from lens_kernels.call import LossCall
from lens_kernels.lens import LensHead
from lens_kernels.plan import plan
from lens_kernels.spec import Divergence, LossSpec, check_beta, check_number

Head = LensHead | Tensor


class CallBuilder:
    """Checks the tensors of a call and turns them into a LossCall."""

    def __init__(
        self,
        students: list[Tensor],
        teachers: list[Tensor],
        student_final: list[Tensor],
        teacher_final: list[Tensor],
        student_head: Head,
        teacher_head: Head,
        mask: Tensor | None,
        backend: Any,
        final_terms: int = 1,
    ) -> None:
        if len(students) != len(teachers):
            raise ValueError(
                "student_hidden and teacher_hidden must pair up:"
                f" got {len(students)} and {len(teachers)} hidden states"
            )
        self.student_head = check.head("student_head", student_head)
        self.teacher_head = check.head("teacher_head", teacher_head)
        self.device = self.student_head.weight.device
        check.check_device("teacher_head.weight", self.teacher_head.weight, self.device)
        device_type = self.device.type
        autocast = torch.is_autocast_enabled(device_type)
        self.operand_dtype = torch.get_autocast_dtype(device_type) if autocast else None
        named = []
        for name, hidden, head in (
            ("student_hidden", students, self.student_head),
            ("teacher_hidden", teachers, self.teacher_head),
            ("student_final", student_final, self.student_head),
            ("teacher_final", teacher_final, self.teacher_head),
        ):
            head_name = name.split("_")[0] + "_head"
            check.check_side(name, hidden, head_name, head, autocast)
            named += check.numbered(name, hidden)
        # The final pair enters once for each divergence that it is compared by.
        student_final, teacher_final = student_final * final_terms, teacher_final * final_terms
        self.normed = (True,) * len(students) + (False,) * len(student_final)
        self.students, self.teachers = (
            [x.reshape(-1, x.shape[-1]) for x in side]
            for side in (students + student_final, teachers + teacher_final)
        )
        self.shape = check.leading_shape(named)
        self.mask = check.token_mask(mask, self.shape, self.device)
        self.labels: Tensor | None = None
        self.has_label: Tensor | None = None
        if not isinstance(backend, str):
            raise TypeError(f"backend must be a string, got {type(backend).__name__}")
        weights = self.student_head.weight.dtype, self.teacher_head.weight.dtype
        self.operand = self.operand_dtype or weights[0]
        known = backend, self.device, torch.float64 in weights, self.operand
        self._choose = partial(dispatch.choose, *known)
        self.backend = self._choose()
        self.fp64 = self.backend.differentiable or torch.float64 in weights
        self.result_dtype = (
            torch.float64 if self.student_head.weight.dtype is torch.float64 else torch.float32
        )

    def set_labels(self, labels: Any, vocab_size: Any, default_mask: bool) -> None:
        """Take labels, and with ``default_mask`` count the tokens that have one."""
        if labels is None:
            return
        size = check.shared_vocabulary(vocab_size, self.student_head, self.teacher_head)
        flat = check.token_labels(labels, self.shape, self.device, size)
        self.has_label = flat != check.IGNORE_INDEX
        self.labels = flat.clamp(min=0)
        if default_mask:
            self.mask = self.has_label

    def counted(self) -> Tensor:
        """Return 1 for each token that counts and 0 for the others, ``(N,)``."""
        dtype = torch.float64 if self.fp64 else torch.float32
        if self.mask is None:
            return torch.ones(self.shape.numel(), dtype=dtype, device=self.device)
        return self.mask.to(dtype)

    def labelled(self) -> Tensor | None:
        """Return 1 for each token that counts and has a label, ``(N,)``."""
        return None if self.has_label is None else self.counted() * self.has_label

    def denominator(self, value: Any, counted: Tensor) -> Tensor | float:
        """Return what a sum over tokens is divided by."""
        if value is None:
            return counted.sum().clamp(min=1)
        return check.token_denominator(value, self.device)

    def spec(
        self,
        *,
        divergences: tuple[Divergence, ...],
        beta: Any,
        temperature: Any,
        vocab_size: Any,
        workspace_bytes: Any,
        grad_threshold: Any,
    ) -> LossSpec:
        """Check all that is not a tensor, and choose the backend for good."""
        threshold, relative = check.threshold(grad_threshold, self.backend.differentiable)
        spec = LossSpec(
            divergences=divergences,
            normed=self.normed,
            beta=check_beta(beta),
            temperature=check_number("temperature", temperature, 0.0),
            vocab_size=check.shared_vocabulary(vocab_size, self.student_head, self.teacher_head),
            workspace_bytes=check.workspace(workspace_bytes, self.device),
            grad_threshold=threshold,
            threshold_is_relative=relative,
        )
        self.backend = self._choose(cost=lambda name: self._cost(name, spec))
        return spec

    def _cost(self, backend: str, spec: LossSpec) -> float:
        """Return what the call costs on a backend, as if no token were masked."""
        head, norm = self.student_head.weight, self.student_head.norm
        before_head = [*self.students, *([norm.weight, norm.bias] if norm else [])]
        grad_mode = torch.is_grad_enabled()
        planned = (
            plan(
                max(1, self.shape.numel()),
                spec.vocab_size,
                head.shape[1],
                self.teacher_head.weight.shape[1],
                divergence=divergence.value,
                dtype=self.operand,
                head_grad=grad_mode and head.requires_grad,
                hidden_grad=grad_mode
                and any(x is not None and x.requires_grad for x in before_head),
                workspace_bytes=spec.workspace_bytes,
                device=self.device.type,
            )
            for divergence in spec.divergences
        )
        return sum(each[backend].cost for each in planned)

    def head_share(self, spec: LossSpec) -> Tensor:
        """Return the adaptive KL's weight of the forward KL for each token, ``(N,)``."""
        return adaptive.head_share(
            self.students[-1],
            self.teachers[-1],
            self.student_head,
            self.teacher_head,
            self.mask,
            self.operand_dtype,
            torch.float64 if self.fp64 else torch.float32,
            spec,
        )

    def call(self, spec: LossSpec, row_weight: Tensor) -> LossCall:
        """Return what the backend evaluates."""
        grad_mode = torch.is_grad_enabled()
        reached = [*self.students, *self.student_head.tensors().values()]
        return LossCall(
            student_hidden=self.students,
            teacher_hidden=self.teachers,
            student_head=self.student_head,
            teacher_head=self.teacher_head,
            mask=self.mask,
            labels=self.labels,
            row_weight=row_weight,
            operand_dtype=self.operand_dtype,
            spec=spec,
            needs_grad=[grad_mode and x.requires_grad for x in reached],
        )

    def finish(self, value: Tensor) -> Tensor:
        """Return a result in the dtype that is promised."""
        return value.to(self.result_dtype)
