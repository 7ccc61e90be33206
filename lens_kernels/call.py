"""The input of a backend (``LossCall``), its form as operator arguments, and the result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from lens_kernels import compat
from lens_kernels.inputs import Inputs
from lens_kernels.lens import LensHead, LensNorm, compute_dtype
from lens_kernels.options import (
    Divergence,
    LossOptions,
    parse_grad_threshold,
    workspace_or_default,
)
from lens_kernels.targets import TargetRows


class Term(NamedTuple):
    """A divergence between the student's and the teacher's hidden state number ``state``."""

    divergence: Divergence
    state: int


@dataclass(frozen=True, eq=False)
class LossCall:
    """A checked call of a loss, over ``P`` pairs of hidden states of ``N`` tokens.

    The loss is ``sum(row_weight * rows)``. ``rows[i]`` holds the divergence of pair ``i`` for each
    token. With ``labels``, the next row holds the cross entropy of the last student hidden state.
    Without pairs, the call has one student hidden state, for the cross entropy. With ``reports``,
    two more rows hold the log-sum-exp and the entropy of that state at temperature 1, with weight
    0. Tokens with a False ``mask`` are not computed, and their ``rows`` are 0.

    ``divergences`` and ``normed`` have one entry for each pair. ``normed`` is true if the call must
    apply the head's norm. ``operand_dtype`` is the dtype of autocast. ``needs_grad`` has a flag for
    each student hidden state, then for each tensor of the student's head. ``backend`` is the name
    of the chosen backend. If the call is ``deferred``, its backward pass computes the gradients.
    ``teacher_statistics`` ``(P, N, 2)``, if given, hold ``maximum`` and ``log sum exp(z -
    maximum)`` of the teacher's logits ``z``. ``linear_cross_entropy`` documents ``label_smoothing``
    and ``z_loss``.

    ``teacher_of`` holds the index of each pair's head in ``teacher_heads``, or is empty if all
    pairs have the same head. With ``targets``, only the first pairs have ``teacher_hidden``, if
    any. All other pairs compare the student with the targets. ``standardized`` has a flag for each
    pair, or is empty. Divergences above ``token_clip`` become ``token_clip``, and have no gradient.

    ``group`` is the name of a process group, or empty. With a group, this rank holds ``vocab_size``
    of the ``whole_size`` entries. ``labels`` and ids of ``targets`` count from the first entry of
    this rank, so those of other ranks' entries are out of range. All ranks size their tiles for
    ``widest`` entries, the largest number that a rank holds.
    """

    student_hidden: list[Tensor]
    teacher_hidden: list[Tensor]
    student_head: LensHead
    teacher_heads: tuple[LensHead, ...]
    mask: Tensor | None
    labels: Tensor | None
    row_weight: Tensor
    divergences: tuple[Divergence, ...]
    normed: tuple[bool, ...]
    needs_grad: list[bool]
    beta: float
    temperature: float
    vocab_size: int
    workspace_bytes: int
    operand_dtype: torch.dtype | None = None
    grad_threshold: float | None = None
    threshold_is_relative: bool = False
    backend: str = ""
    deferred: bool = False
    teacher_statistics: Tensor | None = None
    group: str = ""
    widest: int = 0
    whole_size: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reports: bool = False
    targets: TargetRows | None = None
    standardized: tuple[bool, ...] = ()
    token_clip: float = math.inf
    teacher_temperature: float | None = None
    teacher_of: tuple[int, ...] = ()

    @staticmethod
    def of(
        inputs: Inputs,
        terms: list[Term],
        options: LossOptions,
        row_weight: Tensor,
        statistics: Tensor | None = None,
        **others: Any,
    ) -> LossCall:
        """Return the call that computes ``terms``. Without terms, the call has only labels.

        ``statistics`` ``(S, N, 2)`` are the log-sum-exps of the teacher's logits. ``others`` are
        further fields of the call.
        """
        student, teacher, shard = inputs.student, inputs.teacher, inputs.shard
        labels, standardize = inputs.labels, options.standardize
        targets = inputs.targets if terms else None
        if shard is not None:
            labels = None if labels is None else labels - shard.start
            if targets is not None:
                targets = targets._replace(ids=targets.ids - shard.start)
        # Without terms, the cross entropy still needs the last hidden state.
        states = [term.state for term in terms] or [-1]
        student_hidden = student.hidden
        hidden = [student_hidden[i] for i in states]
        teacher_hidden = [] if teacher is None else teacher.hidden
        # With sparse targets, the teacher has no final state, which all later terms would need.
        compared = [i for i in states if targets is None or i >= 0] if teacher else []
        teacher_of: tuple[int, ...] = ()
        if teacher is not None and len(teacher.heads) > 1:
            teacher_of = tuple([[*teacher.heads].index(teacher.head_names[i]) for i in compared])
        normed = tuple([i % len(student_hidden) < student.lenses for i in states])
        grad_mode = torch.is_grad_enabled()
        reached = [*hidden, *student.head.tensors().values()]
        threshold, relative = parse_grad_threshold("grad_threshold", options.grad_threshold)
        return LossCall(
            student_hidden=hidden,
            teacher_hidden=[teacher_hidden[i] for i in compared],
            student_head=student.head,
            teacher_heads=tuple(teacher.heads.values()) if teacher else (),
            teacher_of=teacher_of,
            mask=inputs.mask,
            labels=labels,
            row_weight=row_weight,
            divergences=tuple(term.divergence for term in terms),
            normed=normed,
            needs_grad=[grad_mode and x.requires_grad for x in reached],
            operand_dtype=inputs.operand_dtype,
            beta=options.beta,
            temperature=options.temperature,
            teacher_temperature=options.teacher_temperature,
            targets=targets,
            standardized=tuple(
                standardize is True or (standardize == "lens" and lens)
                for lens in normed[: len(terms)]
            ),
            token_clip=math.inf if options.token_clip is None else options.token_clip,
            vocab_size=inputs.vocab_size if shard is None else shard.columns,
            workspace_bytes=workspace_or_default(options.workspace_bytes, inputs.device),
            grad_threshold=threshold,
            threshold_is_relative=relative,
            teacher_statistics=None if statistics is None else statistics[states],
            group="" if shard is None else shard.group,
            widest=0 if shard is None else shard.widest,
            whole_size=inputs.vocab_size,
            **others,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of logits, losses and gradients."""
        return compute_dtype(self.student_head, *self.teacher_heads)

    def has_teacher(self, pair: int) -> bool:
        """Return whether a pair is compared with hidden states of a teacher."""
        return pair < len(self.teacher_hidden)

    def teacher_index(self, pair: int) -> int:
        """Return the index of a pair's head in ``teacher_heads``, or 0."""
        return self.teacher_of[pair] if self.teacher_of and self.has_teacher(pair) else 0

    @property
    def temperatures(self) -> tuple[float, float]:
        """Return the temperatures of student and teacher."""
        theirs = self.teacher_temperature
        return self.temperature, self.temperature if theirs is None else theirs

    @property
    def label_row(self) -> int:
        """Return the index of the row of losses that holds the cross entropy."""
        return len(self.divergences)

    @property
    def labels_need_statistics(self) -> bool:
        """Return whether the cross entropy needs other statistics than the last pair's logits have.

        Its temperature is 1, and its logits are not standardised.
        """
        if self.labels is None or not self.divergences:
            return self.labels is not None
        own = self.temperature != 1.0 or any(self.standardized[-1:])
        return own or self.label_smoothing > 0 or self.reports

    def features(self) -> tuple[str, ...]:
        """Return the names of this call's features that some backends do not support."""
        used = {
            "label_smoothing": self.label_smoothing > 0,
            "z_loss": self.z_loss > 0,
            "return_lse or return_entropy": self.reports,
            "SparseTargets": self.targets is not None,
            "SparseTargets.rest": self.targets is not None and self.targets.has_rest,
            "standardize": any(self.standardized),
            "token_clip": self.token_clip < math.inf,
        }
        return tuple([name for name in used if used[name]])

    def needing_grad(self) -> dict[int | str, Tensor]:
        """Return the tensors that need a gradient.

        Keys are the index of the pair for hidden states, and the name for tensors of the head.
        """
        if self.deferred:
            return {}
        named: list[tuple[int | str, Tensor]] = [*enumerate(self.student_hidden)]
        named += self.student_head.tensors().items()
        return {key: x for (key, x), needed in zip(named, self.needs_grad, strict=True) if needed}

    def pack(self) -> Packed:
        """Return the call in the form of operator arguments."""
        heads = [self.student_head, *self.teacher_heads]
        optional = [(name, getattr(self, name)) for name in OPTIONAL]
        if self.targets is not None:
            optional += [*zip(TargetRows._fields, self.targets, strict=True)]
        given = [(name, x) for name, x in optional if x is not None]
        numbers = [getattr(self, name) for name in NUMBERS]
        numbers += [x for head in heads for x in _numbers_of(head)]
        of_teachers = [x for head in self.teacher_heads for x in head.tensors().values()]
        return Packed(
            student=[*self.student_hidden, *self.student_head.tensors().values()],
            row_weight=self.row_weight,
            constants=[*of_teachers, *[x for _, x in given], *self.teacher_hidden],
            numbers=[math.nan if x is None else float(x) for x in numbers],
            sizes=[getattr(self, name) for name in SIZES],
            settings=_as_json(
                [getattr(self, name) for name in SETTINGS],
                [name for name, _ in given],
                [[head.norm and head.norm.kind, [*head.tensors()]] for head in heads],
            ),
            needs_grad=self.needs_grad,
        )


class Packed(NamedTuple):
    """The fields of a ``LossCall`` in the form and the order of operator arguments.

    ``student`` are the student's hidden states and the tensors of its head, with a flag each in
    ``needs_grad``. ``constants`` are the tensors that never get a gradient. ``settings`` is JSON:
    all other fields, and the names of tensors.
    """

    student: list[Tensor]
    row_weight: Tensor
    constants: list[Tensor]
    numbers: list[float]
    sizes: list[int]
    settings: str
    needs_grad: list[bool]

    def unpack(self) -> LossCall:
        """Return the call from which ``pack`` made these arguments."""
        settings, given, heads = json.loads(self.settings)
        tensors = chain(self.student, self.constants)
        numbers = (None if math.isnan(x) else x for x in self.numbers)
        fields: dict[str, Any] = {name: next(numbers) for name in NUMBERS}
        student_hidden = [*islice(tensors, len(self.student) - len(heads[0][1]))]
        student_head, *teacher_heads = (
            _head_of({name: next(tensors) for name in names}, kind, numbers)
            for kind, names in heads
        )
        optional = {name: next(tensors) for name in given}
        rows = {name: optional.pop(name) for name in TargetRows._fields if name in optional}
        fields |= dict.fromkeys(OPTIONAL) | optional
        fields |= zip(SIZES, self.sizes, strict=True)
        for name, value in zip(SETTINGS, settings, strict=True):
            fields[name] = tuple(value) if isinstance(value, list) else value
        fields["divergences"] = tuple(Divergence(name) for name in fields["divergences"])
        if fields["operand_dtype"] is not None:
            fields["operand_dtype"] = getattr(torch, fields["operand_dtype"].removeprefix("torch."))
        return LossCall(
            student_hidden=student_hidden,
            teacher_hidden=[*tensors],
            student_head=student_head,
            teacher_heads=tuple(teacher_heads),
            row_weight=self.row_weight,
            needs_grad=self.needs_grad,
            targets=TargetRows(**rows) if rows else None,
            **fields,
        )


# The fields of ``Packed`` in the language of torch's operator schemas.
SCHEMA = (
    "Tensor[] student, Tensor row_weight, Tensor[] constants, float[] numbers, SymInt[] sizes,"
    " str settings, bool[] needs_grad"
)


def _fields(*kinds: Any) -> tuple[str, ...]:
    """Return the names of the fields of ``LossCall`` that have one of these types."""
    return tuple(name for name, kind in get_type_hints(LossCall).items() if kind in kinds)


# The type of a field decides how it is packed, so a new field of these types needs no code.
OPTIONAL = _fields(Tensor | None)
NUMBERS = _fields(float, float | None)
SIZES = _fields(int)
SETTINGS = _fields(
    str, bool, tuple[bool, ...], tuple[int, ...], tuple[Divergence, ...], torch.dtype | None
)


@compat.constant_in_graphs  # torch.compile cannot trace ``json``
def _as_json(*values: object) -> str:
    return json.dumps(values, default=str)


def _numbers_of(head: LensHead) -> list[float | None]:
    norm = [] if head.norm is None else [head.norm.eps, head.norm.offset]
    return [head.scale, head.softcap, *norm]


def _head_of(tensors: dict[str, Tensor], norm_kind: str | None, numbers: Iterator[Any]) -> LensHead:
    scale, softcap, norm = next(numbers), next(numbers), None
    if norm_kind is not None:
        weight, bias = tensors.get("norm_weight"), tensors.get("norm_bias")
        norm = LensNorm(norm_kind, weight, bias, eps=next(numbers), offset=next(numbers))
    return LensHead(tensors["weight"], tensors.get("bias"), norm, scale, softcap)


@dataclass(frozen=True, eq=False)
class LossResult:
    """The losses ``rows`` of a call, and its gradients, by the keys of ``call.needing_grad()``.

    ``dropped`` is the share of logit gradients, by absolute sum, that ``grad_threshold`` skipped.
    It is 0 without a threshold.
    """

    rows: Tensor
    grads: dict[int | str, Tensor]
    dropped: Tensor
