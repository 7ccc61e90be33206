"""A series of calls of which only the first may compile kernels.

As a program, this module needs no GPU. After each call, it prints how many different kernels Triton
would have compiled for an H100. ``TRITON_INTERPRET`` must be unset.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lens_kernels import LensHead, distillation_loss, symmetric_lens_loss
from tests.support.problems import random_head

FIRST = {
    "tokens": 64,
    "vocab": 211,
    "temperature": 1.0,
    "scale": 1.0,
    "softcap": 30.0,
    "beta": 0.5,
    "kd_ratio": 0.5,
}
CALLS = [
    FIRST,
    *({**FIRST, "tokens": tokens} for tokens in (1, 2, 16, 37, 38, 40, 300)),
    *({**FIRST, "vocab": vocab} for vocab in (2, 64, 1000, 1024)),
    *({**FIRST, "temperature": temperature} for temperature in (0.5, 2.0)),
    {**FIRST, "scale": 0.25},
    {**FIRST, "softcap": 1.0},
    {**FIRST, "beta": 0.9},
    # kd_ratio=0 is left out, because it runs another kernel.
    {**FIRST, "kd_ratio": 0.9},
]


def run(device: torch.device, tokens: int, vocab: int, kd_ratio: float, **numbers: float) -> None:
    scale, softcap = numbers.pop("scale"), numbers.pop("softcap")

    def head(width: int) -> LensHead:
        made = random_head(vocab, width, bias=True, norm="rms", scale=scale, softcap=softcap)
        return made.map(lambda x: x.detach().to(device).requires_grad_())

    def hidden(width: int) -> list[torch.Tensor]:
        return [torch.randn(tokens, width, device=device).requires_grad_() for _ in range(3)]

    (*student, student_final), (*teacher, teacher_final) = hidden(48), hidden(80)
    heads = head(48), head(80)
    options: dict[str, Any] = {**numbers, "backend": "triton"}
    labels = torch.randint(vocab, (tokens,), device=device)
    output = distillation_loss(
        student, teacher, *heads, student_final=student_final, teacher_final=teacher_final,
        labels=labels, kd_ratio=kd_ratio, **options,
    )  # fmt: skip
    output.loss.backward()
    symmetric_lens_loss(student, teacher, *heads, **options).backward()


def main() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime import jit

    from lens_kernels import dispatch
    from lens_kernels.backends.triton.tiles import sizes, store

    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys = set()

    def bind(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = jit.create_function_from_signature(self.signature, self.params, backend)
        _, specialization, chosen = binder(*args, **options, debug=False, instrumentation_mode="")
        keys.add((self.fn.__name__, str(specialization), str(chosen)))

    jit.JITFunction.run = bind
    sizes.arch_of = lambda device: sizes.ARCHS["sm_90"]
    store.lookup = lambda *args: None
    entry = dispatch.REGISTRY["triton"]
    dispatch.REGISTRY["triton"] = dataclasses.replace(entry, unsupported_reason=lambda *args: None)
    for call in CALLS:
        run(torch.device("cpu"), **call)
        print(len(keys), call)  # noqa: T201
    print(*sorted(keys), sep="\n")  # noqa: T201


if __name__ == "__main__":
    main()
