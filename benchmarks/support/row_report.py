"""Compiles the row kernels without a GPU, and reports instructions and bytes per pair of logits.

A pair is the student's and the teacher's logit for one token and vocabulary entry. The instructions
and bytes of the loops over a row are read from the machine code. A kernel that holds a row in a
cluster has no loop, so all its instructions count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.support import offline
from benchmarks.support.offline import FEATURES, INSTRUCTION, Launch
from lens_kernels.backends.torch import clusters
from lens_kernels.backends.torch.layout import row_stride
from lens_kernels.backends.torch.passes import Terms
from lens_kernels.backends.torch.row_kernel_pass import RowKernelPass
from lens_kernels.options import Divergence
from lens_kernels.targets import TargetRows

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The variants of a kernel. ``plain`` has a gradient and no options. ``statistics`` adds the
# teacher's log-sum-exps. ``all`` adds every other option, except for grad_threshold if a cluster of
# programs holds a row. A test also compiles ``targets``, with standardised logits.
VARIANTS = ("plain", "statistics", "loss only", "labels", "all")
TOKENS, VOCAB = 16, 4099
# The architectures, variants and vocabulary size (of Qwen2.5) of kernels that hold a row in a
# cluster of programs.
HOLDING = {"sm_90": 9, "sm_100": 10}
HELD_VARIANTS, HELD_VOCAB = ("plain", "labels", "all"), 151936
LABEL = re.compile(r"^\.?(L\w+):")
BRANCH = re.compile(r"\bBRA\b.*`\(\.(L\w+)\)|s_c?branch\w*\s+\.(L\w+)")
# Matches loads and stores in the assembly of NVIDIA and AMD. WORDS has the bytes of AMD's word
# sizes.
ACCESS = re.compile(r"\b(LDG|STG)\.E(?:\.\w+)*?(?:\.(64|128|U8|U16))?\b|global_(load|store)_(\w+)")
WORDS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "short": 2, "ushort": 2}


@dataclass(frozen=True)
class RowKernel:
    """A compiled variant of a row kernel for one architecture, with the costs of its loops.

    ``cluster`` is the number of programs that hold a row. It is 1 for the kernel that reads a row
    several times.
    """

    arch: str
    cluster: int
    divergence: str
    variant: str
    registers: int
    spilled_bytes: int
    warps_per_processor: int  # estimated from the kernel's registers and shared memory
    loops: tuple[Loop, ...]

    def total(self, name: str) -> float:
        """Return the sum of a cost over all loops, per pair of logits."""
        return sum(getattr(loop, name) for loop in self.loops)

    def columns(self) -> dict[str, Any]:
        """Return the kernel as a CSV row."""
        names = ("arch", "cluster", "divergence", "variant", "registers", "spilled_bytes")
        widths = sorted({width for loop in self.loops for width in loop.widths})
        known = {name: getattr(self, name) for name in (*names, "warps_per_processor")}
        return known | {
            "sweeps": len(self.loops) or "",
            "instructions_a_pair": round(self.total("instructions"), 1) or "",
            "bytes_a_pair": round(self.total("bytes_moved"), 1) or "",
            "access_bytes": " ".join(map(str, widths)),
        }


@dataclass(frozen=True)
class Loop:
    """The costs of a loop over a row.

    ``instructions`` and ``bytes_moved`` are per pair of logits, and ``widths`` are the bytes of
    each access.
    """

    instructions: float
    bytes_moved: float
    widths: tuple[int, ...]


def cluster_on(arch: str, held: bool) -> clusters.Cluster | None:
    """Return the cluster that holds a row of ``HELD_VOCAB`` entries, or None if not ``held``."""
    cluster = clusters.that_holds(HELD_VOCAB)
    if not held or cluster is None:
        return None
    return cluster._replace(registers=clusters.REGISTERS[HOLDING[arch]])


def record(
    arch: str,
    dtype: torch.dtype,
    divergence: Divergence,
    variant: str,
    beta: float = 0.5,
    held: bool = False,
) -> Launch:
    """Return the recorded launch of a row kernel on one tile of logits."""
    everything, only_loss = variant == "all", variant == "loss only"
    features = FEATURES["all"] if everything else frozenset({"labels"} & {variant})
    options = {"beta": beta, "temperature": 2.0 if everything else 1.0}
    vocab = HELD_VOCAB if held else VOCAB
    call = offline.loss_call(dtype, (TOKENS, vocab), (16, 16), divergence, features, **options)
    row, labels = torch.ones(TOKENS), call.labels
    with mock.patch.object(clusters, "for_call", lambda call: cluster_on(arch, held)):
        made = RowKernelPass(call, dtype, TOKENS)
    stride = made.layout.grad_stride
    assert stride is not None
    tiles = [torch.zeros(TOKENS, row_stride(vocab))[:, :vocab] for _ in range(2)]
    grad = None if only_loss else torch.zeros(TOKENS, stride, dtype=dtype)[:, :vocab]
    with offline.recorder(arch) as launches:
        grad_stats = made.grad_stats() if everything and not held else None
        terms = Terms(divergence, row, labels, None if labels is None else row)
        if variant == "statistics":
            terms = terms._replace(teacher_statistics=torch.zeros(TOKENS, 2))
        if variant == "targets":
            sparse = TargetRows(torch.zeros(TOKENS, 9).long(), torch.ones(TOKENS, 9), row)
            terms = terms._replace(targets=sparse, standardized=True)
        made.run(tiles, terms, grad, grad_stats)
    (launch,) = launches
    return launch


def measure(
    arch: str,
    dtype: torch.dtype,
    divergence: Divergence,
    variant: str,
    beta: float = 0.5,
    held: bool = False,
) -> RowKernel:
    """Compile a variant of a kernel, and return it with the costs of its loops.

    ``held`` selects the kernel that holds rows in a cluster of programs.
    """
    launch = record(arch, dtype, divergence, variant, beta, held)
    code, registers, spilled, _, programs = offline.machine_code(arch, launch)
    options = dict(launch.options)
    threads = (64 if arch.startswith("gfx") else 32) * options["num_warps"] * options["num_ctas"]
    fixed = launch.fixed()
    # The pairs of logits that a thread processes: in each iteration of a loop, or in total if a
    # cluster holds the row.
    pairs = fixed["LANES"] * fixed["GROUP"] * fixed.get("BLOCKS", 1) / threads
    bodies = [instructions(code)] if held else loops(code)
    return RowKernel(
        arch,
        options["num_ctas"],
        fixed["DIVERGENCE"],
        variant,
        registers,
        spilled,
        programs * options["num_warps"],
        # The loops of AMD's code are not read, because its compiler moves parts of a loop out of
        # the loop.
        ()
        if arch.startswith("gfx")
        else tuple(loop_costs(body, pairs, 16 if held else 1) for body in bodies),
    )


def instructions(code: str) -> list[str]:
    """Return all instructions."""
    return [line for line in code.splitlines() if INSTRUCTION.match(line)]


def loops(code: str) -> list[list[str]]:
    """Return the instructions of each innermost loop: from a label to the branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found: list[list[str]] = []
    last = 0
    for line in code.splitlines():
        label = LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
        elif INSTRUCTION.match(line):
            instructions.append(line)
            branch = BRANCH.search(line)
            target = labels.get(branch[1] or branch[2]) if branch else None
            if target is not None and target >= last and len(instructions) - target > 1:
                found.append(instructions[target:])
                last = len(instructions)
    return found


def loop_costs(body: list[str], pairs: float, least: int = 1) -> Loop:
    """Return the costs of a loop in which each thread processes ``pairs`` pairs of logits.

    Accesses below ``least`` bytes do not count, because they load one value for the whole row.
    """
    widths = []
    for line in body:
        access = ACCESS.search(line)
        if access:
            width = access[2] or "32"
            bits = {"U8": 8, "U16": 16}.get(width) or int(width if width.isdigit() else 32)
            size = WORDS.get(access[4], 1) if access[4] else bits // 8
            if size >= least:
                widths.append(size)
    return Loop(len(body) / pairs, sum(widths) / pairs, tuple(widths))


def measure_all(archs: Sequence[str], dtype: torch.dtype) -> list[RowKernel]:
    """Compile the variants of every divergence. For jsd, also compile a beta other than 1/2."""
    kinds = [(divergence, 0.5) for divergence in Divergence] + [(Divergence.JSD, 0.3)]
    jobs = [
        (arch, dtype, divergence, variant, beta, held)
        for arch in archs
        if arch in ARCHS
        for held in (False, True)[: 1 + (arch in HOLDING)]
        for divergence, beta in kinds
        for variant in (HELD_VARIANTS if held else VARIANTS)
    ]
    with ProcessPoolExecutor() as pool:
        return [*pool.map(measure, *zip(*jobs, strict=True))]
