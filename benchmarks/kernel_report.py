"""What the compiler makes of the kernels for GPUs that are not there, and what each sweep costs.

    python benchmarks/kernel_report.py                  every variant, bf16, all architectures
    python benchmarks/kernel_report.py --arch sm_90 --dtype float16
    python benchmarks/kernel_report.py --costs-only --readme

Registers, spilled bytes, shared memory and matrix instructions are read from the machine code; how
many programs a processor holds follows from them. Costs are arithmetic. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from benchmarks import harness
from benchmarks.shapes import MODELS, Model
from lens_kernels import plan

# Either side of the width at which the sweeps' tiles change, and every size of a norm's block.
WIDTHS = (576, 1024, 2048, 4096, 8192)
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}

PLANNED = ("gpt2", "tinyllama", "qwen2.5", "llama3", "gemma2")
README = harness.ROOT / "README.md"
README_TOKENS = 8192
README_HEADER = (
    f"{README_TOKENS} tokens, one pair",
    "TFLOP: dense and `torch`",
    "`triton`",
    "GB moved: dense / `torch` / `triton`",
    "GB held: dense / `torch` / `triton`",
)
BEGIN = "<!-- made by kernel_report.py --readme from lens_kernels.plan -->"
END = "<!-- end of what kernel_report.py made -->"


def compile_all(archs: Sequence[str], dtype: str) -> list[Any]:
    """Compile every kernel variant for every architecture, two at a time or more."""
    from benchmarks import offline
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


def kernel_row(compiled: Any) -> dict[str, Any]:
    """Return one row of the first table."""
    return {
        "arch": compiled.arch,
        "kernel": compiled.launch.kernel.removesuffix("_kernel"),
        "variant": compiled.launch.variant(),
        "tile": compiled.launch.tile(),
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "shared_bytes": compiled.shared_bytes,
        "matrix": compiled.matrix,
        "matrix_count": compiled.matrix_count,
        "instructions": compiled.instructions,
        "programs_per_processor": compiled.programs,
    }


def cost_rows(model: Model, tokens: int) -> list[dict[str, Any]]:
    """Return what each step multiplies and moves for one lens pair, and the dense floor."""
    sizes = (tokens, model.vocab, model.student, model.teacher)
    jsd, kl = (plan(*sizes, divergence=name) for name in ("jsd", "forward_kl"))
    floor = jsd["dense"]
    rows = [(step.name, step) for step in [*jsd["triton"].steps[:2], *kl["triton"].steps]]
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


def readme_table() -> str:
    """Return what a step costs on each backend for some pairs of models, as the README has it."""
    rows = []
    for key in PLANNED:
        model = MODELS[key]
        plans = plan(README_TOKENS, model.vocab, model.student, model.teacher)
        cells = [f"{plans[name].flops / 1e12:.1f}" for name in ("torch", "triton")]
        for quantity in ("bytes_moved", "workspace_bytes"):
            sizes = [getattr(plans[name], quantity) / 1e9 for name in ("dense", "torch", "triton")]
            cells.append(" / ".join(f"{size:.1f}" for size in sizes))
        rows.append([model.name, *cells])
    return harness.markdown_table(README_HEADER, rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    harness.print_table(list(rows[0]), [[str(x) for x in row.values()] for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables, write them as CSV, and fail if a kernel spills or lacks its products."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHS)
    parser.add_argument("--dtype", default="bfloat16", choices=[*DTYPES])
    parser.add_argument("--tokens", type=int, default=8192, help="of the cost table")
    parser.add_argument("--costs-only", action="store_true", help="compile nothing")
    parser.add_argument(
        "--readme", action="store_true", help="also write the table of plans into README.md"
    )
    parser.add_argument("--out", type=Path, default=harness.OUT, help="folder of the CSV files")
    args = parser.parse_args(argv)
    costs = [row for model in MODELS.values() for row in cost_rows(model, args.tokens)]
    print(f"One lens pair, {args.tokens} tokens, 16-bit operands; computed, not measured")
    show(costs)
    harness.write_csv(args.out / "kernel_costs.csv", costs)
    if args.readme:
        text = README.read_text(encoding="utf-8")
        new = harness.replaced_between(text, BEGIN, END, readme_table())
        README.write_text(new, encoding="utf-8")
    if args.costs_only:
        return 0
    os.environ.pop("TRITON_INTERPRET", None)  # here kernels are compiled, which imports decide
    from benchmarks import offline

    # Products are rounded to TF32 on NVIDIA alone.
    archs = args.arch or [a for a in ARCHS if args.dtype != "tf32" or a != "gfx942"]
    compiled = compile_all(archs, args.dtype)
    versions = {"dtype": args.dtype, "triton": harness.version_of("triton")}
    rows = [{**kernel_row(c), **versions} for c in compiled]
    show(rows)
    harness.write_csv(args.out / f"kernel_report_{args.dtype}.csv", rows)
    faults = [fault for c in compiled if (fault := offline.fault(c, args.dtype))]
    for fault in faults:
        print(fault)
    print(f"{len(compiled)} kernels compiled, {len(faults)} with a fault; no GPU was used")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
