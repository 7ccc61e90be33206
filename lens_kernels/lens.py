"""A logit lens: the final norm and the vocabulary head, applied to any hidden state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lens_kernels.options import check_number

NORM_KINDS = ("rms", "layer")


@dataclass(frozen=True, eq=False)
class LensNorm:
    """A final norm: ``(h - mean) / sqrt(var + eps) * (weight + offset) + bias``.

    Attributes:
        kind: ``"layer"``, or ``"rms"``, which omits the mean and whose ``var`` is the mean square.
        weight: ``(D,)``, or None for a norm without a learned scale.
        bias: ``(D,)``, or None.
        eps: Number that is added to ``var``.
        offset: Number that is added to the weight; 1 in Gemma.

    Raises:
        ValueError: ``kind`` is unknown, or a number is out of range.
    """

    kind: str
    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = field(kw_only=True)
    offset: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        """Check each field by itself."""
        if self.kind not in NORM_KINDS:
            raise ValueError(f"LensNorm.kind={self.kind!r} is unknown; choose 'rms' or 'layer'")
        check_number("LensNorm.eps", self.eps, 0.0, inclusive=True)
        check_number("LensNorm.offset", self.offset, float("-inf"))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(y, x_hat, rstd)``: the norm of ``h``, its normalised rows, and ``1 / scale``.

        ``h``, ``y`` and ``x_hat`` are ``(..., D)``. ``rstd`` is ``(..., 1)``.
        """
        if self.kind == "layer":
            h = h - h.mean(-1, keepdim=True)
        rstd = (h.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        x_hat = h * rstd
        y = x_hat if self.weight is None else x_hat * self._scale(x_hat)
        return (y if self.bias is None else y + self.bias.to(y.dtype)), x_hat, rstd

    def backward(self, grad: Tensor, x_hat: Tensor, rstd: Tensor) -> Tensor:
        """Return the gradient with respect to ``h``, ``(..., D)``.

        ``grad`` is the gradient with respect to ``forward``'s result ``y``, and ``x_hat`` and
        ``rstd`` are its other results.
        """
        if self.weight is not None:
            grad = grad * self._scale(grad)
        inner = grad - x_hat * (grad * x_hat).mean(-1, keepdim=True)
        if self.kind == "layer":
            inner = inner - grad.mean(-1, keepdim=True)
        return inner * rstd

    def _scale(self, like: Tensor) -> Tensor:
        assert self.weight is not None
        return self.weight.to(like.dtype) + self.offset


@dataclass(frozen=True, eq=False)
class LensTranslator:
    """An affine map before the norm, ``h + weight @ h + bias``, as in tuned lenses.

    Attributes:
        weight: ``(D, D)``. Zeros leave hidden states as they are.
        bias: ``(D,)``. Zeros leave hidden states as they are.

    Raises:
        ValueError: The shapes do not match.
    """

    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        """Check the shapes."""
        width = self.bias.shape[0] if self.bias.dim() == 1 else -1
        if self.weight.shape != (width, width):
            raise ValueError(
                "LensTranslator.weight must be (D, D) and bias (D,), got"
                f" {tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            )

    @classmethod
    def zeros(cls, width: int, **options: Any) -> LensTranslator:
        """Return a translator for hidden size ``width`` that does not change hidden states.

        ``options`` are options of ``torch.zeros``, such as dtype, device and ``requires_grad``.
        """
        return cls(torch.zeros(width, width, **options), torch.zeros(width, **options))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the translated hidden states, in the dtype of ``hidden``."""
        moved = linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return hidden + moved.to(hidden.dtype)


@dataclass(frozen=True, eq=False)
class LogitMap:
    """Maps products ``z`` of the head to logits.

    The logit is ``slope * (z + bias)``, or with a softcap ``cap * tanh(inner * (z + bias))``.
    """

    bias: Tensor | None
    slope: float | Tensor
    inner: float | Tensor | None = None
    cap: float | Tensor | None = None

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return the logits, and their derivative with respect to ``z``."""
        if self.bias is not None:
            z = z + self.bias.to(z.dtype)
        if self.inner is None or self.cap is None:
            return z * self.slope, self.slope
        t = torch.tanh(z * self.inner)
        return t * self.cap, (1 - t * t) * self.slope


@dataclass(frozen=True, eq=False)
class LensHead:
    """A vocabulary head: ``softcap * tanh(scale * (norm(h) @ weight.T + bias) / softcap)``.

    Without ``softcap`` the result is ``scale * (...)``.

    Attributes:
        weight: ``(V, D)``; float32, bfloat16, float16 or float64.
        bias: ``(V,)``, or None.
        norm: The model's final norm, applied to intermediate hidden states, or None. Hugging Face
            returns the final hidden state already normed.
        scale: Number that multiplies the logits, above 0.
        softcap: Bound of the logits, above 0, or None.
        translator: Maps of the intermediate hidden states before the norm: one for each lens pair,
            or one for all, or None. Their tensors get gradients if they require grad.

    Raises:
        TypeError: A tensor, the norm or a translator has another type.
        ValueError: ``scale`` or ``softcap`` is out of range.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: LensNorm | None = None
    scale: float = 1.0
    softcap: float | None = None
    translator: LensTranslator | Sequence[LensTranslator] | None = None

    def __post_init__(self) -> None:
        """Check each field by itself."""
        for name in ("weight", "bias"):
            value = getattr(self, name)
            if not (isinstance(value, Tensor) or (name == "bias" and value is None)):
                raise TypeError(f"LensHead.{name} must be a tensor, got {type(value).__name__}")
        if self.norm is not None and not isinstance(self.norm, LensNorm):
            raise TypeError(f"LensHead.norm must be a LensNorm, got {type(self.norm).__name__}")
        given = self.translator
        for each in given if isinstance(given, (list, tuple)) else [given]:
            # A module such as nn.Linear has the same tensors, but leaves out the sum with ``h``.
            if given is not None and not isinstance(each, LensTranslator):
                kind = type(each).__name__
                raise TypeError(f"LensHead.translator must hold LensTranslators, got {kind}")
        check_number("LensHead.scale", self.scale, 0.0)
        if self.softcap is not None:
            hint = "; use softcap=None for no cap"
            check_number("LensHead.softcap", self.softcap, 0.0, hint=hint)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the head and its norm by name, without missing tensors."""
        named = {"weight": self.weight, "bias": self.bias}
        if self.norm is not None:
            named |= {"norm_weight": self.norm.weight, "norm_bias": self.norm.bias}
        return {name: x for name, x in named.items() if x is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> LensHead:
        """Return a copy of the head with ``function`` applied to each tensor."""
        parts = {name: function(x) for name, x in self.tensors().items()}
        norm = self.norm
        if norm is not None:
            weight, bias = parts.get("norm_weight"), parts.get("norm_bias")
            norm = replace(norm, weight=weight, bias=bias)
        return replace(self, weight=parts["weight"], bias=parts.get("bias"), norm=norm)

    def translated(self, lenses: Sequence[Tensor]) -> list[Tensor]:
        """Apply the translators to ``lenses``, the hidden states of all lens pairs."""
        given = self.translator
        if given is None:
            return [*lenses]
        each = [given] * len(lenses) if isinstance(given, LensTranslator) else [*given]
        if len(each) != len(lenses):
            raise ValueError(
                f"LensHead.translator has {len(each)} translators for {len(lenses)} lens pairs"
            )
        for translator, hidden in zip(each, lenses, strict=True):
            if translator.bias.shape[0] != hidden.shape[-1]:
                raise ValueError(
                    f"LensHead.translator has width {translator.bias.shape[0]}, but the hidden"
                    f" states have width {hidden.shape[-1]}"
                )
        return [translator(hidden) for translator, hidden in zip(each, lenses, strict=True)]

    def prefix(self, vocab_size: int) -> LensHead:
        """Return the head for the first ``vocab_size`` entries. Its tensors are views."""
        if vocab_size == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def logit_map(self, temperature: float) -> LogitMap:
        """Return the map from products ``norm(h) @ weight.T`` to logits over ``temperature``."""
        slope = self.scale / temperature
        if self.softcap is None:
            return LogitMap(self.bias, slope)
        return LogitMap(self.bias, slope, self.scale / self.softcap, self.softcap / temperature)

    def logits(self, z: Tensor, temperature: float) -> tuple[Tensor, Tensor | float]:
        """Map products ``z = norm(h) @ weight.T`` to logits divided by ``temperature``.

        Return also the logits' derivative with respect to ``z``.
        """
        return self.logit_map(temperature)(z)


def compute_dtype(*heads: LensHead) -> torch.dtype:
    """Return the dtype of logits: float64 if a head is float64, else float32."""
    dtypes = [head.weight.dtype for head in heads]
    return torch.float64 if torch.float64 in dtypes else torch.float32
