"""Compares the Triton kernels with the ``torch`` backend on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from lens_kernels.backends.torch import row_chunks
from lens_kernels.backends.triton.evaluate import evaluate
from lens_kernels.backends.triton.kernels.operands import tf32_is_allowed
from lens_kernels.backends.triton.tiles.search import difference
from lens_kernels.call import LossCall, LossResult
from lens_kernels.lens import LensHead, LensNorm
from lens_kernels.options import Divergence

TOKENS = 256  # The check uses at most 256 tokens, which fill several blocks of rows.
TF32_EPS = 2.0**-10


def check(
    student_width: int,
    teacher_width: int,
    vocab_size: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compare losses and gradients of every divergence, without and with norm, bias and softcap.

    Raises:
        RuntimeError: A difference is larger than rounding can explain.
    """
    eps = torch.finfo(dtype).eps
    if dtype is torch.float32 and tf32_is_allowed():
        eps = TF32_EPS
    generator = torch.Generator(device).manual_seed(0)
    sizes = (student_width, teacher_width, vocab_size, min(tokens, TOKENS))
    for extras in (False, True):
        for divergence in Divergence:
            call = _call(sizes, dtype, divergence, extras, generator)
            results, truth = (_tensors(f(call)) for f in (evaluate, row_chunks.evaluate))
            reason = difference(results, truth, max(1e-4, 4 * eps))
            if reason is not None:
                what = "a head with bias, norm and softcap" if extras else "plain heads"
                raise RuntimeError(
                    "on this device the kernels disagree with the torch backend:"
                    f" {divergence.value} of {what} in {dtype}: {reason}. Use backend='torch', and"
                    " please report this"
                )


def _tensors(result: LossResult) -> list[Tensor]:
    return [result.rows, *result.grads.values()]


def _call(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    divergence: Divergence,
    extras: bool,
    generator: torch.Generator,
) -> LossCall:
    *widths, vocab_size, tokens = sizes

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=generator, device=generator.device)
        return x.mul_(scale).to(dtype)

    def head(width: int) -> LensHead:
        weight = random(vocab_size, width, scale=1.5 / width**0.5)
        if not extras:
            return LensHead(weight)
        norm = LensNorm("layer", 1 + random(width, scale=0.1), random(width, scale=0.1), eps=1e-5)
        return LensHead(weight, random(vocab_size), norm, scale=0.9, softcap=10.0)

    heads = [head(width) for width in widths]
    student, teacher = ([random(tokens, width)] for width in widths)
    labels = torch.arange(tokens, device=generator.device) % vocab_size if extras else None
    weight = torch.ones(2 if extras else 1, tokens, device=generator.device)
    return LossCall(
        student_hidden=student,
        teacher_hidden=teacher,
        student_head=heads[0],
        teacher_heads=(heads[1],),
        mask=None,
        labels=labels,
        row_weight=weight,
        divergences=(divergence,),
        normed=(extras,),
        needs_grad=[True] * (1 + len(heads[0].tensors())),
        beta=0.3,
        temperature=1.3 if extras else 1.0,
        vocab_size=vocab_size,
        workspace_bytes=1 << 28,
    )
