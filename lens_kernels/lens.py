"""A logit lens: the final norm and the vocabulary head, applied to any hidden state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

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
        """Check the values that need no other tensor."""
        if self.kind not in NORM_KINDS:
            raise ValueError(f"LensNorm.kind={self.kind!r} is unknown; choose 'rms' or 'layer'")
        check_number("LensNorm.eps", self.eps, 0.0, inclusive=True)
        check_number("LensNorm.offset", self.offset, float("-inf"))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(y, x_hat, rstd)``: the norm of ``h``, the normalised rows, their inverse scale.

        ``h`` is ``(..., D)``, and so are ``y`` and ``x_hat``. ``rstd`` is ``(..., 1)``.
        """
        if self.kind == "layer":
            h = h - h.mean(-1, keepdim=True)
        rstd = (h.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        x_hat = h * rstd
        y = x_hat if self.weight is None else x_hat * self._scale(x_hat)
        return (y if self.bias is None else y + self.bias.to(y.dtype)), x_hat, rstd

    def backward(self, grad: Tensor, x_hat: Tensor, rstd: Tensor) -> Tensor:
        """Return the gradient with respect to ``h``, ``(..., D)``.

        ``grad`` is the gradient of the result. ``x_hat`` and ``rstd`` are those of ``forward``.
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
class LogitMap:
    """Maps products to logits: ``slope * (z + bias)``, or ``cap * tanh(inner * (z + bias))``."""

    bias: Tensor | None
    slope: float | Tensor
    inner: float | Tensor | None = None
    cap: float | Tensor | None = None

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return the logits and their derivative with respect to ``z``."""
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

    Raises:
        TypeError: A tensor or the norm has another type.
        ValueError: ``scale`` or ``softcap`` is out of range.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: LensNorm | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        """Check the values that need no other tensor."""
        for name in ("weight", "bias"):
            value = getattr(self, name)
            if not (isinstance(value, Tensor) or (name == "bias" and value is None)):
                raise TypeError(f"LensHead.{name} must be a tensor, got {type(value).__name__}")
        if self.norm is not None and not isinstance(self.norm, LensNorm):
            raise TypeError(f"LensHead.norm must be a LensNorm, got {type(self.norm).__name__}")
        check_number("LensHead.scale", self.scale, 0.0)
        if self.softcap is not None:
            hint = "; use softcap=None for no cap"
            check_number("LensHead.softcap", self.softcap, 0.0, hint=hint)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of head and norm by name, without those that are None."""
        named = {"weight": self.weight, "bias": self.bias}
        if self.norm is not None:
            named |= {"norm_weight": self.norm.weight, "norm_bias": self.norm.bias}
        return {name: x for name, x in named.items() if x is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> LensHead:
        """Return the head with ``function`` applied to each of its tensors."""
        parts = {name: function(x) for name, x in self.tensors().items()}
        norm = self.norm
        if norm is not None:
            weight, bias = parts.get("norm_weight"), parts.get("norm_bias")
            norm = replace(norm, weight=weight, bias=bias)
        return replace(self, weight=parts["weight"], bias=parts.get("bias"), norm=norm)

    def prefix(self, vocab_size: int) -> LensHead:
        """Return the head over the first ``vocab_size`` entries, as views."""
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
        """Map ``z = norm(h) @ weight.T`` to logits over ``temperature``.

        Return also the logits' derivative with respect to ``z``.
        """
        return self.logit_map(temperature)(z)


def compute_dtype(*heads: LensHead | None) -> torch.dtype:
    """Return the dtype of arithmetic on logits: float32, or float64 with a float64 head."""
    dtypes = [head.weight.dtype for head in heads if head is not None]
    return torch.float64 if torch.float64 in dtypes else torch.float32
