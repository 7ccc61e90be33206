"""Counts what TorchInductor's kernels of the pointwise pass move on a GPU, without a GPU.

Calls with label smoothing, a z-loss, reports or the rest of sparse targets use these kernels.
Inductor generates their code for fake CUDA tensors, and Triton compiles it. Bytes are counted from
the loads and stores in the generated code: those whose address depends on the row and on the
vocabulary entry. The scatter of gradients at the ids of targets is left out, because it moves a few
values for each row.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.support import compat, offline
from benchmarks.support.row_report import instructions, loops
from lens_kernels.backends import compiled
from lens_kernels.backends.torch.layout import row_stride
from lens_kernels.backends.torch.passes import Terms
from lens_kernels.backends.torch.pointwise_pass import TorchPass, tile_pass
from lens_kernels.options import Divergence
from lens_kernels.targets import TargetRows

ARCH = "sm_90"
# An H100's answers to Inductor's questions.
PROPERTIES = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    total_memory=80 << 30,
)  # fmt: skip
ROWS, VOCAB, IDS = 512, 151936, 8
# The features of a call, as fields of ``LossCall`` or of ``TargetRows``.
CASES: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-4},
    "reports": {"reports": True},
    "all three": {"label_smoothing": 0.1, "z_loss": 1e-4, "reports": True},
    "sparse targets, ghost": {"rest": True},
    "sparse targets, uniform": {"smoothing": True},
}
ACCESS = re.compile(r"tl\.(load|store)\((\w+) \+ \((.*?)\), ")
DEFINED = re.compile(r"^ *(\w+) = (.*)$")
SIZES = {"*fp32": 4, "*fp64": 8, "*i64": 8}


@dataclass(frozen=True)
class InductorPass:
    """The kernels that Inductor generates for the pass of one call, and their costs.

    ``bytes_moved`` and ``instructions`` are per logit of the student, which is a pair of logits if
    there is a teacher. ``registers`` is the largest number of a kernel.
    """

    features: str
    divergence: str
    gradient: bool
    kernels: int
    bytes_moved: int
    instructions: float
    registers: int
    spilled_bytes: int

    def columns(self) -> dict[str, Any]:
        """Return the pass as a CSV row."""
        named = vars(self) | {"arch": ARCH, "instructions": round(self.instructions, 1)}
        return named | {"torch": torch.__version__}


def arguments(
    features: str, divergence: Divergence | None, gradient: bool, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Return arguments of ``tile_pass`` without data, on the meta device."""
    options = dict(CASES[features])
    sparse = {name: options.pop(name) for name in ("rest", "smoothing") if name in options}
    sizes, widths = (2, 64), (8, 8)
    kind = divergence or Divergence.JSD
    call = offline.loss_call(dtype, sizes, widths, kind, frozenset(), temperature=1.0)
    made = TorchPass(replace(call, **options), dtype, 2)
    row = torch.empty(ROWS, device="meta")
    tiles = [torch.empty(ROWS, row_stride(VOCAB), device="meta")[:, :VOCAB] for _ in range(2)]
    terms = Terms(divergence, None if divergence is None else row, row.long(), row)
    if sparse:
        ids = torch.empty(ROWS, IDS, device="meta")
        targets = TargetRows(ids.long(), ids, row, **dict.fromkeys(sparse, row))
        terms = Terms(Divergence.FORWARD_KL, row, None, None, targets=targets)
    tiles = tiles[: 1 + (divergence is not None and not sparse)]
    return *made.arguments(tiles, terms, slice(0, ROWS)), gradient


def on_cuda(x: Any) -> Any:
    """Replace meta tensors by fake CUDA tensors, also within tuples and lists."""
    if isinstance(x, torch.Tensor):
        if x.device.type != "meta":
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(on_cuda, x))
    return type(x)(map(on_cuda, x)) if isinstance(x, (tuple, list)) else x


def measure(
    features: str,
    divergence: Divergence | None = None,
    gradient: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> InductorPass:
    """Let Inductor generate the kernels of a pass, compile them, and count their costs."""
    with compat.inductor_for(offline.TARGETS[ARCH][0], PROPERTIES):
        given = arguments(features, divergence, gradient, dtype)
        with compat.fake_tensors(outside=True):
            given = on_cuda(given)
        pass_for_gpu = compiled._compile_for_gpu(tile_pass)
        kernels = compat.generated_kernels(pass_for_gpu, *given)
        costs = [costs_of(*kernel) for kernel in kernels]
    moved, counted, registers, spilled = zip(*costs, strict=True)
    return InductorPass(
        features, divergence.value if divergence else "", gradient, len(kernels), sum(moved),
        sum(counted), max(registers), sum(spilled),
    )  # fmt: skip


def costs_of(name: str, source: str) -> tuple[int, float, int, int]:
    """Return a kernel's bytes and instructions per logit, registers and spilled bytes."""
    kernel, blocks, warps = compat.compile_generated(name, source)
    code, registers, spilled, _, _ = offline.read_machine_code(ARCH, kernel)
    pairs = blocks["XBLOCK"] * blocks.get("R0_BLOCK", 1) / (32 * warps)
    hints = re.search(r"size_hints=\{(.*?)\}", source)
    assert hints is not None
    if math.prod(map(int, re.findall(r": (\d+)", hints[1]))) < ROWS * VOCAB:
        return 0, 0.0, registers, spilled  # the kernel processes a few values for each row
    bodies = loops(code) if "R0_BLOCK" in blocks else [instructions(code)]
    return bytes_moved(source), sum(map(len, bodies)) / pairs, registers, spilled


def bytes_moved(source: str) -> int:
    """Return the bytes that a generated kernel loads and stores for each logit."""
    types = dict(re.findall(r"'(\w+)': '(\*\w+)'", source))
    varies = {"xindex": {"row", "entry"}, "r0_index": {"entry"}}
    if "R0_BLOCK" in source:
        varies["xindex"] = {"row"}
    total = 0
    for line in source.splitlines():
        defined = DEFINED.match(line)
        if defined and re.fullmatch(r"x\d|r0_\d", defined[1]):
            varies[defined[1]] = _dependence(defined[2], varies)
        access = ACCESS.search(line)
        if access and _dependence(access[3], varies) == {"row", "entry"}:
            total += SIZES[types[access[2]]]
    return total


def _dependence(expression: str, varies: dict[str, set[str]]) -> set[str]:
    """Return what the value of an index depends on: the row, the vocabulary entry, or both."""
    names = re.findall(r"[a-z]\w*", expression)
    found = set().union(*(varies.get(name, set()) for name in names))
    if f"% {VOCAB}" in expression:
        return found - {"row"}
    return found - {"entry"} if f"// {VOCAB}" in expression else found


def measure_all(dtype: torch.dtype) -> list[InductorPass]:
    """Return the passes of all features, with and without a gradient, and with a teacher."""
    compat.register_device_guard()
    return [
        measure(features, divergence, gradient, dtype)
        for features in CASES
        for divergence in (None, Divergence.JSD)
        if divergence is None or not features.startswith("sparse")
        for gradient in (True, False)
    ]
