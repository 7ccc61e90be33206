"""Compiles the kernels for a GPU that this machine does not have, and reads the machine code.

The backend runs on tiny CPU tensors, but Triton is told that the device is the GPU. A hook records
every kernel before it is compiled, so arguments, options and block sizes are those of the GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from lens_kernels import LensHead, LensNorm
from lens_kernels.backends import triton as backend
from lens_kernels.backends.triton.kernels.launch import Tile
from lens_kernels.backends.triton.kernels.operands import Operand
from lens_kernels.backends.triton.tiles import sizes, store
from lens_kernels.call import LossCall
from lens_kernels.options import Divergence
from lens_kernels.targets import TargetRows

# Maps each architecture to Triton's target, and to the first letters of its fastest matrix
# instructions.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "HMMA"),
    "sm_89": (GPUTarget("cuda", 89, 32), "HMMA"),
    "sm_90": (GPUTarget("cuda", 90, 32), "HGMMA"),
    "sm_100": (GPUTarget("cuda", 100, 32), "UTCHMMA"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "v_mfma"),
}
ANY_MATRIX = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA|v_mfma)\w*")
INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/|\t[vsdbg]\w*_)")
# Launch options that change the machine code of a kernel.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
# Triton's name for the type of an argument whose value is compiled into the kernel.
CONSTANT = "constexpr"
# The position of an argument: one number, or two numbers for an element of a tuple.
Path = tuple[int, ...]
# The numbers of registers, threads and blocks that fit on a multiprocessor of NVIDIA's data-centre
# GPUs.
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32


@dataclass(frozen=True)
class Launch:
    """A recorded launch of a kernel, with everything on which the kernel's machine code depends."""

    kernel: str
    module: str
    signature: tuple[tuple[str, Any], ...]  # the names and types of the arguments
    constants: tuple[tuple[Path, Any], ...]
    divisible: tuple[Path, ...]
    options: tuple[tuple[str, Any], ...]

    def fixed(self) -> dict[str, Any]:
        """Return the values that are compiled into the kernel, by argument, without tuples."""
        names = [name for name, _ in self.signature]
        return {names[path[0]]: value for path, value in self.constants if len(path) == 1}

    def variant(self) -> str:
        """Return a text that names this variant of the kernel."""
        types, fixed = dict(self.signature), self.fixed()
        words = []
        if "LAYER" in fixed:
            words.append("layer" if fixed["LAYER"] else "rms")
        if "DIVERGENCE" in fixed:
            words += [fixed["DIVERGENCE"]] if fixed["DIVERGENCE"] else []
        model = types.get("operand") or types.get("student") or [CONSTANT] * 9
        _, _, bias, *_, cap, own = model
        optional = {"bias": types.get("bias_ptr", bias), "softcap": cap, "standardized": own}
        optional |= {"labels": types.get("labels"), "mask": types.get("index_ptr")}
        sums = ("moment", "sum"), ("outside",), ("targets",), ("correction",)
        for name in [name for names in sums for name in names]:
            optional[name] = types.get(f"{name}_ptr", types.get(name))
        return " ".join(words + [k for k, v in optional.items() if v not in (None, CONSTANT)])

    def tile(self) -> str:
        """Return the block sizes and the numbers of warps and stages, as a text."""
        blocks = [str(v) for k, v in self.fixed().items() if k.startswith("BLOCK_")]
        options = dict(self.options)
        # The norm kernels have no stages, because these pipeline the loads of a loop.
        stages = "" if self.kernel.startswith("norm") else options["num_stages"]
        return f"{'x'.join(blocks)}/{options['num_warps']}w{stages}"


@dataclass(frozen=True)
class Compiled:
    """A launch that was compiled for an architecture, and the resources of the kernel."""

    arch: str
    launch: Launch
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix: str
    matrix_count: int
    instructions: int
    programs_per_processor: int  # estimated from registers, shared memory and threads

    def columns(self) -> dict[str, Any]:
        """Return the kernel as a CSV row."""
        kernel = self.launch.kernel.removesuffix("_kernel")
        names = {"kernel": kernel, "variant": self.launch.variant(), "tile": self.launch.tile()}
        return {"arch": self.arch, **names} | {k: v for k, v in vars(self).items() if k != "launch"}


FEATURES: dict[str, frozenset[str]] = {
    "plain": frozenset(),
    "all but softcap": frozenset({"bias", "labels", "mask", "layer"}),
    "all": frozenset({"bias", "labels", "mask", "layer", "softcap"}),
}
FEATURES["standardized"] = FEATURES["all"] | {"standardized"}
# Sparse targets replace the teacher. The second part is how they treat the rest of the mass.
for _rest in ("none", "ghost", "uniform"):
    FEATURES[f"targets, {_rest}"] = FEATURES["standardized"] | {"targets", _rest}
FEATURES["z-loss"] = FEATURES["all"] | {"z-loss"}


def head(dtype: torch.dtype, vocab: int, width: int, features: frozenset[str]) -> LensHead:
    """Return a head of zeros with the optional parts in ``features``."""
    weight = torch.zeros(vocab, width, dtype=dtype)
    layer = "layer" in features
    norm = LensNorm("layer" if layer else "rms", weight[0], weight[0] if layer else None, eps=1e-6)
    bias = torch.zeros(vocab, dtype=dtype) if "bias" in features else None
    return LensHead(weight, bias, norm, softcap=30.0 if "softcap" in features else None)


def record(
    arch: str,
    dtype: torch.dtype,
    widths: tuple[int, int],
    divergence: Divergence,
    features: frozenset[str],
    tile: Tile | None = None,
    tf32: bool = False,
) -> list[Launch]:
    """Return the launches of a loss and its gradients, one for each variant of a kernel."""
    call = loss_call(dtype, (32, 64), widths, divergence, features, temperature=2.0)
    with recorder(arch, tile, tf32) as launches:
        backend.evaluate(call)
    return list(dict.fromkeys(launches))


def loss_call(
    dtype: torch.dtype,
    sizes: tuple[int, int],
    widths: tuple[int, int],
    divergence: Divergence,
    features: frozenset[str],
    **options: Any,
) -> LossCall:
    """Return a call with ``features``. ``sizes`` are the tokens and the vocabulary size."""
    tokens, vocab = sizes
    student, teacher = (head(dtype, vocab, width, features) for width in widths)
    hidden = [torch.zeros(tokens, width, dtype=dtype) for width in widths]
    labels = torch.zeros(tokens, dtype=torch.int64) if "labels" in features else None
    targets, row = None, torch.ones(tokens)
    if "targets" in features:
        divergence = Divergence.FORWARD_KL
        rest, smoothing = (row if name in features else None for name in ("ghost", "uniform"))
        ids = torch.zeros(tokens, 9, dtype=torch.int64)
        targets = TargetRows(ids, torch.ones(tokens, 9), row, smoothing, rest)
    if "z-loss" in features:
        options |= {"label_smoothing": 0.1, "z_loss": 1e-4}
    return LossCall(
        student_hidden=hidden[:1],
        teacher_hidden=[] if targets else hidden[1:],
        student_head=student,
        teacher_heads=() if targets else (teacher,),
        targets=targets,
        standardized=("standardized" in features,),
        mask=torch.ones(tokens, dtype=torch.bool) if "mask" in features else None,
        labels=labels,
        row_weight=torch.ones(1 if labels is None else 2, tokens),
        divergences=(divergence,),
        normed=(True,),
        needs_grad=[True] * (1 + len(student.tensors())),
        vocab_size=vocab,
        workspace_bytes=1 << 20,
        **({"beta": 0.5} | options),
    )


@contextmanager
def recorder(arch: str, tile: Tile | None = None, tf32: bool = False) -> Iterator[list[Launch]]:
    """Record launches without running them, as if the device had the architecture ``arch``."""
    launches: list[Launch] = []

    def collect(fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        types, constants = (tuple(compile[name].items()) for name in ("signature", "constants"))
        divisible = tuple(path for path, value in compile["configs"][0].items() if value)
        chosen = json.loads(compile["specialization_data"])["options"]
        options = tuple((name, chosen[name]) for name in OPTIONS if name in chosen)
        launches.append(Launch(fn.name, fn.module, types, constants, divisible, options))
        return True  # True makes Triton skip compilation and launch

    patches: dict[tuple[Any, str], Any] = {
        (sizes, "arch_of"): lambda device: sizes.ARCHS[arch],
    }
    patches[store, "lookup"] = lambda *args: None
    if tf32:
        patches[Operand, "precision"] = property(lambda operand: "tf32")
    if tile is not None:
        patches[sizes, "default"] = lambda *args: tile
    device = SimpleNamespace(
        get_current_device=lambda: arch,  # the key of Triton's caches
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGETS[arch][0],
    )
    driver.set_active(device)
    with ExitStack() as stack, triton.knobs.runtime.scope():
        for (owner, name), patch in patches.items():
            stack.enter_context(mock.patch.object(owner, name, patch))
        triton.knobs.runtime.jit_cache_hook = collect
        yield launches


def machine_code(arch: str, launch: Launch) -> tuple[str, int, int, int, int]:
    """Return the machine code of a launch and the resources of the kernel.

    The resources are registers, spilled bytes, bytes of shared memory, and programs that fit on a
    multiprocessor.
    """
    module = __import__(launch.module, fromlist=[launch.kernel])
    source = ASTSource(
        getattr(module, launch.kernel),
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={path: [["tt.divisibility", 16]] for path in launch.divisible},
    )
    compiled = triton.compile(source, target=TARGETS[arch][0], options=dict(launch.options))
    return read_machine_code(arch, compiled)


def read_machine_code(arch: str, compiled: Any) -> tuple[str, int, int, int, int]:
    """Return what ``machine_code`` returns, for a kernel that Triton has compiled."""
    shared = compiled.metadata.shared
    read = _read_amd if arch.startswith("gfx") else _read_nvidia
    code, registers, spilled, programs = read(compiled, shared)
    return code, registers, spilled, shared, programs


def compile_for(arch: str, launch: Launch) -> Compiled:
    """Compile a launch for an architecture, and read the resources from the machine code."""
    code, registers, spilled, shared, programs = machine_code(arch, launch)
    found = [match.group(1) for match in ANY_MATRIX.finditer(code)]
    matrix = max(set(found), key=found.count) if found else "none"
    length = sum(bool(INSTRUCTION.match(line)) for line in code.splitlines())
    resources = registers, spilled, shared
    return Compiled(arch, launch, *resources, matrix, len(found), length, programs)


def _read_nvidia(compiled: Any, shared: int) -> tuple[str, int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    # A kernel with few registers can still spill, so the stack size and accesses to the stack are
    # counted.
    spilled = int(re.findall(r"STACK:(\d+)", usage)[-1])
    spilled = max(spilled, len(re.findall(r"\b(?:LDL|STL)\b", code)))
    threads = 32 * compiled.metadata.num_warps
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = sizes.ARCHS[f"sm_{compiled.metadata.target.arch}"].shared_memory // (shared + 1024)
    return code, registers, spilled, min(by_registers, by_shared, THREADS // threads, BLOCKS)


def _read_amd(compiled: Any, shared: int) -> tuple[str, int, int, int]:
    code = compiled.asm["amdgcn"]

    def figure(pattern: str) -> int:
        return int(re.findall(pattern + r"\s*(\d+)", code)[-1])

    # An AMD multiprocessor has four SIMD units. The compiler reports how many waves fit on one
    # unit. All waves of a program must fit on the multiprocessor.
    waves = 4 * figure("; Occupancy:")
    by_shared = sizes.ARCHS["gfx942"].shared_memory // max(1, shared)
    programs = min(waves // compiled.metadata.num_warps, by_shared)
    return code, figure(r"\.vgpr_count:"), figure("; ScratchSize:"), programs


def _tool(name: str, *args: str) -> str:
    path = FilePath(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


def fault(compiled: Compiled, dtype: str) -> str | None:
    """Return a message if a compiled kernel spills registers or lacks matrix instructions."""
    name = f"{compiled.arch} {compiled.launch.kernel} {compiled.launch.variant()}"
    if compiled.spilled_bytes:
        return f"{name} {compiled.launch.tile()} spills {compiled.spilled_bytes} bytes"
    # NVIDIA GPUs have no matrix instruction for exact fp32.
    best = TARGETS[compiled.arch][1]
    exempt = compiled.launch.kernel.startswith("norm") or dtype == "float32"
    if exempt or compiled.matrix == best:
        return None
    return f"{name} multiplies with {compiled.matrix} instead of {best}"
