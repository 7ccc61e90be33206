"""Compile the kernels without a GPU, and report their resources and the cost of each sweep.

    python benchmarks/kernel_report.py                  every variant, bf16, all architectures
    python benchmarks/kernel_report.py --arch sm_90 --dtype float16
    python benchmarks/kernel_report.py --costs-only     counts, and the time predicted from them
    python benchmarks/kernel_report.py --row-pass-only  the kernel of the torch backend on GPUs
    python benchmarks/kernel_report.py --sweeps-only    the kernels of the triton backend
    python benchmarks/kernel_report.py --inductor-only  the kernels that Inductor makes for GPUs

Registers, spilled bytes, shared memory and matrix instructions are read from the machine code. They
determine how many programs fit on a multiprocessor. Costs are calculated. Nothing is timed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import environment, prediction, tables
from benchmarks.support.shapes import MODELS, Model
from lens_kernels import Plan, plan
from lens_kernels.cost import Step

# Hidden sizes with which every default block size of the sweeps and of the norm occurs.
WIDTHS = (576, 1024, 2048, 4096, 8192)
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}

PLANNED = ("gpt2", "tinyllama", "qwen2.5", "llama3", "gemma2")
PAGE = environment.ROOT / "docs" / "memory_and_speed.md"
PAGE_TOKENS = 8192
PAGE_HEADER = (
    f"{PAGE_TOKENS} tokens, one pair",
    "TFLOP: dense and `torch`",
    "`triton`",
    "GB moved: dense / `torch` / `triton`",
    "GB held: dense / `torch` / `triton`",
)
BEGIN = "<!-- made by kernel_report.py --docs from lens_kernels.plan -->"
PREDICTED = "<!-- predicted by kernel_report.py --docs from lens_kernels.plan -->"
BUFFERS = "<!-- buffers, by kernel_report.py --docs from lens_kernels.plan -->"
END = "<!-- end of what kernel_report.py made -->"


def compile_all(archs: Sequence[str], dtype: str) -> list[Any]:
    """Compile every variant of the kernels for every architecture, in parallel."""
    from benchmarks.support import offline
    from lens_kernels.options import Divergence

    jobs = dict.fromkeys(
        (arch, launch)
        for arch in archs
        for width in WIDTHS
        for features in offline.FEATURES.values()
        for divergence in Divergence
        for launch in offline.record(
            arch, DTYPES[dtype], (width, width), divergence, features, tf32=dtype == "tf32"
        )
    )
    results = []
    with ProcessPoolExecutor() as pool:
        for compiled in pool.map(offline.compile_for, *zip(*jobs, strict=True)):
            results.append(compiled)
            print(f"\r  compiled {len(results)} of {len(jobs)}", end="", flush=True)
    print()
    return results


def cost_rows(model: Model, tokens: int) -> list[dict[str, Any]]:
    """Return the operations and bytes of each step for one lens pair, and of dense PyTorch."""
    sizes = (tokens, model.vocab, model.student, model.teacher)
    jsd, kl = (plan(*sizes, divergence=name) for name in ("jsd", "forward_kl"))
    floor = jsd["dense"]
    sweeps = [*jsd["triton"].steps[:2], *kl["triton"].steps]
    rows: list[tuple[str, Step | Plan]] = [(step.name, step) for step in sweeps]
    rows += [("all, jsd tvd hellinger", jsd["triton"]), ("all, KL family", kl["triton"])]
    rows += [("torch backend", jsd["torch"]), ("dense floor", floor)]
    return [
        {
            "model": model.name,
            "step": name,
            "tflop": round(part.flops / 1e12, 2),
            "of_floor": round(part.flops / floor.flops, 2),
            "gb": round(part.bytes_moved / 1e9, 2),
            "workspace_gb": round(getattr(part, "workspace_bytes", 0) / 1e9, 2),
        }
        for name, part in rows
    ]


def plan_table() -> str:
    """Return the table of the documentation: the cost on each backend for some pairs of models."""
    rows = []
    for key in PLANNED:
        model = MODELS[key]
        plans = plan(PAGE_TOKENS, model.vocab, model.student, model.teacher)
        cells = [f"{plans[name].flops / 1e12:.1f}" for name in ("torch", "triton")]
        for quantity in ("bytes_moved", "workspace_bytes"):
            sizes = [getattr(plans[name], quantity) / 1e9 for name in ("dense", "torch", "triton")]
            cells.append(" / ".join(f"{size:.1f}" for size in sizes))
        rows.append([model.name, *cells])
    return tables.markdown_table(PAGE_HEADER, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print and write the tables. Fail if a kernel spills or lacks matrix instructions."""
    parser = environment.parser(__doc__, on_device=False)
    parser.add_argument("--arch", action="append", choices=ARCHS)
    parser.add_argument("--dtype", default="bfloat16", choices=[*DTYPES])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in the cost table")
    parser.add_argument("--costs-only", action="store_true", help="compile nothing")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--row-pass-only", action="store_true", help="compile only the row kernel")
    only.add_argument("--sweeps-only", action="store_true", help="leave out the row kernel")
    only.add_argument("--inductor-only", action="store_true", help="compile Inductor's kernels")
    parser.add_argument(
        "--docs",
        action="store_true",
        help=f"also write plans and predictions into docs/{PAGE.name}",
    )
    args = parser.parse_args(argv)
    costs = [row for model in MODELS.values() for row in cost_rows(model, args.tokens)]
    print(f"One lens pair, {args.tokens} tokens, 16-bit operands; computed, not measured")
    tables.print_rows(costs)
    tables.write_csv(args.out / "kernel_costs.csv", costs)
    print(prediction.table())
    print(prediction.buffers_table())
    if args.docs:
        tables.rewrite(PAGE, BEGIN, END, plan_table())
        tables.rewrite(PAGE, PREDICTED, END, prediction.table())
        tables.rewrite(PAGE, BUFFERS, END, prediction.buffers_table())
    if args.costs_only:
        return 0
    # Triton reads TRITON_INTERPRET when the modules below are imported. Without it, kernels are
    # compiled and not interpreted.
    os.environ.pop("TRITON_INTERPRET", None)
    from benchmarks.support import offline

    if args.inductor_only:
        from benchmarks.support import inductor_report

        passes = inductor_report.measure_all(DTYPES[args.dtype])
        rows = [each.columns() | {"triton": environment.version_of("triton")} for each in passes]
        tables.print_rows(rows)
        tables.write_csv(args.out / "inductor_pass.csv", rows)
        return int(any(each.spilled_bytes for each in passes))
    # Only GPUs of NVIDIA have TF32.
    archs = args.arch or [a for a in ARCHS if args.dtype != "tf32" or a != "gfx942"]
    versions = {"dtype": args.dtype, "triton": environment.version_of("triton")}
    # The row kernel multiplies no matrices.
    if args.dtype != "tf32" and not args.sweeps_only:
        from benchmarks.support import row_report

        kernels = row_report.measure_all(args.arch or row_report.ARCHS, DTYPES[args.dtype])
        rows = [kernel.columns() | versions for kernel in kernels]
        tables.print_rows(rows)
        tables.write_csv(args.out / f"row_pass_{args.dtype}.csv", rows)
        if args.row_pass_only:
            return int(any(kernel.spilled_bytes for kernel in kernels))
    compiled = compile_all(archs, args.dtype)
    rows = [c.columns() | versions for c in compiled]
    tables.print_rows(rows)
    tables.write_csv(args.out / f"kernel_report_{args.dtype}.csv", rows)
    faults = [fault for c in compiled if (fault := offline.fault(c, args.dtype))]
    for fault in faults:
        print(fault)
    print(f"{len(compiled)} kernels compiled, {len(faults)} with a fault; no GPU was used")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
