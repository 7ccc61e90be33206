"""A call keeps all its fields in the form of operator arguments."""

import dataclasses

import torch

from lens_kernels import LensHead, LensNorm
from lens_kernels.call import LossCall
from lens_kernels.options import Divergence
from lens_kernels.targets import TargetRows


def full_call():
    """Return a call in which no field has its default."""
    x = torch.ones(1)
    norm = LensNorm("layer", x, x, eps=1.0, offset=2.0)
    return LossCall(
        student_hidden=[x, x],
        teacher_hidden=[x, x],
        student_head=LensHead(x, x, norm, scale=3.0, softcap=4.0),
        teacher_heads=(LensHead(x), LensHead(x, softcap=13.0)),
        mask=x,
        labels=x,
        row_weight=x,
        divergences=(Divergence.TVD, Divergence.JSD),
        normed=(True, False),
        needs_grad=[True, False],
        beta=0.25,
        temperature=5.0,
        vocab_size=6,
        workspace_bytes=7,
        operand_dtype=torch.bfloat16,
        grad_threshold=8.0,
        threshold_is_relative=True,
        backend="torch",
        deferred=True,
        teacher_statistics=x,
        group="ranks",
        widest=9,
        whole_size=14,
        label_smoothing=0.5,
        z_loss=10.0,
        reports=True,
        targets=TargetRows(x, x, x, rest=x),
        standardized=(False, True),
        token_clip=11.0,
        teacher_temperature=12.0,
        teacher_of=(1, 0),
    )


def plain(value):
    """Return a field as a list of its parts, with tensors by identity."""
    if isinstance(value, (LensHead, LensNorm)):
        return [plain(x) for x in vars(value).values()]
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    return id(value) if isinstance(value, torch.Tensor) else value


def test_every_field_survives_packing():
    call = full_call()
    unpacked = call.pack().unpack()
    for field in dataclasses.fields(LossCall):
        before, after = (getattr(x, field.name) for x in (call, unpacked))
        assert plain(before) != plain(field.default), f"full_call() lacks {field.name}"
        assert plain(before) == plain(after), field.name


def test_fields_without_a_value_survive_packing():
    x = torch.ones(1)
    head = LensHead(x)
    call = LossCall([x], [], head, (), None, None, x, (), (False,), [False, False], 0.5, 1.0, 1, 1)
    unpacked = call.pack().unpack()
    for field in dataclasses.fields(LossCall):
        before, after = (getattr(x, field.name) for x in (call, unpacked))
        assert plain(before) == plain(after), field.name
