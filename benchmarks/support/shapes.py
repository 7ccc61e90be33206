"""The sizes of real models, and the jobs of the benchmarks: sizes and random inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """The hidden sizes of a student and its teacher, and their vocabulary size."""

    name: str
    student: int
    teacher: int
    vocab: int

    def job(self, tokens: int, **options: Any) -> Job:
        """Return a job with the sizes of this model."""
        widths = {"student_width": self.student, "teacher_width": self.teacher}
        return Job(tokens, **{"vocab": self.vocab, **widths, **options})


# The sizes are from the models' configs. In "student < teacher", the names are those of the models.
MODELS = {
    "gpt2": Model("GPT-2 124M < 1.5B", 768, 1600, 50257),
    "tinyllama": Model("TinyLlama 1.1B < Llama-2 7B", 2048, 4096, 32000),
    "smollm2": Model("SmolLM2 135M < 1.7B", 576, 2048, 49152),
    "qwen2.5": Model("Qwen2.5 1.5B < 3B", 1536, 2048, 151936),
    "qwen2.5-0.5b": Model("Qwen2.5 0.5B < 7B", 896, 3584, 151936),
    "llama3": Model("Llama-3 1B < 8B", 2048, 4096, 128256),
    "gemma2": Model("Gemma-2 2B < 9B", 2304, 3584, 256000),
}


@dataclass(frozen=True)
class Job:
    """The sizes of one measurement. By default, hidden sizes are those of GPT-2 124M and 1.5B."""

    tokens: int
    vocab: int
    pairs: int = 1
    student_width: int = 768
    teacher_width: int = 1600
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    masked: float = 0.0

    def columns(self) -> dict[str, Any]:
        """Return the sizes as columns of a CSV."""
        return {
            "tokens": self.tokens,
            "vocab_entries": self.vocab,
            "pairs": self.pairs,
            "masked": f"{self.masked:g}",
            "student_width": self.student_width,
            "teacher_width": self.teacher_width,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def gemm_flops(self) -> int:
        """Return the operations of the GEMMs: two for logits and two for gradients of each pair."""
        width = 3 * self.student_width + self.teacher_width
        return 2 * self.pairs * (self.tokens - self.ignored()) * self.vocab * width

    def ignored(self) -> int:
        """Return the number of masked tokens."""
        return round(self.masked * self.tokens)

    def make(self) -> Inputs:
        """Return random inputs, whose distributions are neither flat nor one-hot."""
        torch.manual_seed(0)

        def random(rows: int, width: int, scale: float) -> Tensor:
            # The inputs repeat after 8192 rows, because generating 10^9 random numbers takes too
            # long.
            block = torch.randn(min(rows, 8192), width, device=self.device) * scale
            return block.repeat(-(-rows // block.shape[0]), 1)[:rows].to(self.dtype)

        widths = (self.student_width, self.teacher_width)
        student, teacher = (
            [random(self.tokens, width, 1.0) for _ in range(self.pairs)] for width in widths
        )
        heads = [random(self.vocab, width, 1.5 / math.sqrt(width)) for width in widths]
        for x in (*student, heads[0]):
            x.requires_grad_()
        mask = None
        if self.masked:
            mask = torch.ones(self.tokens, dtype=torch.bool, device=self.device)
            mask[torch.randperm(self.tokens, device=self.device)[: self.ignored()]] = False
        return Inputs(student, teacher, heads[0], heads[1], mask)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Hidden states ``(N, D)`` of each pair, heads ``(V, D)``, and the mask (True: counted)."""

    student_hidden: list[Tensor]
    teacher_hidden: list[Tensor]
    student_head: Tensor
    teacher_head: Tensor
    mask: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """Return the tensors that receive gradients."""
        return [*self.student_hidden, self.student_head]

    def clear(self) -> None:
        """Set all gradients to None."""
        for x in self.leaves():
            x.grad = None

    def pairs(self, count: int) -> Inputs:
        """Return inputs with only the first ``count`` pairs."""
        first = {name: getattr(self, name)[:count] for name in ("student_hidden", "teacher_hidden")}
        return replace(self, **first)

    def counted(self, hidden: Tensor) -> Tensor:
        """Return a hidden state's rows of unmasked tokens."""
        return hidden if self.mask is None else hidden[self.mask]
