"""Time of loss and backward against the floor: the four products with the heads alone.

    python benchmarks/speed_vs_floor.py                          about a minute on two cores
    python benchmarks/speed_vs_floor.py --uncompiled --bf16      more rows

The floor projects student and teacher and makes the gradients of hidden states and head, each by
one ``torch.mm`` of plain operands in the dtype of the row. ``floor_tiled`` does the same by the
backend's own functions, which on a CPU cut the projections into tiles because that is faster there,
and which work in fp32 on every device that cannot sum 16-bit products in fp32.

Ratios are those of the medians; ``best_ratio_to_floor`` is that of the quickest rounds, which on a
machine with other work to do are the ones to go by.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without an install

from benchmarks import harness, providers  # noqa: E402
from lens_kernels.backends import matmul  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    start = time.perf_counter()
    device = torch.device(args.device)
    for key in ("lens_kernels", "dense", "dense_kl_div"):
        providers.check(providers.CONTENDERS[key], device)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16) if args.bf16 else (torch.float32,):
        job = providers.Job(
            args.tokens,
            args.vocab,
            args.pairs,
            args.student_width,
            args.teacher_width,
            dtype,
            device,
        )
        print(f"{job.tokens} tokens, {job.vocab} entries, {str(dtype).removeprefix('torch.')}")
        timings = harness.time_interleaved(functions(job, args.uncompiled), args.rounds, device)
        rows += rows_of(job, timings)
    environment = harness.environment(device)
    path = args.out / "speed_vs_floor.csv"
    harness.write_csv(path, [row | environment for row in rows])
    columns = ["contender", "dtype", "median_ms", "min_ms", "max_ms"]
    columns += ["ratio_to_floor", "best_ratio_to_floor"]
    print()
    harness.print_table(columns, [[str(row[column]) for column in columns] for row in rows])
    print(f"\n{path}\n{time.perf_counter() - start:.0f} s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, default=harness.OUT, metavar="DIR")
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--student-width", type=int, default=768)
    parser.add_argument("--teacher-width", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one to warm up")
    parser.add_argument("--bf16", action="store_true", help="also with bfloat16 inputs")
    parser.add_argument("--uncompiled", action="store_true", help="also without the compiler")
    return parser.parse_args(argv)


def functions(job: providers.Job, uncompiled: bool) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name, on shared inputs."""
    inputs = job.make()

    def step(loss: Callable[[providers.Inputs], torch.Tensor]) -> Callable[[], Any]:
        def run() -> None:
            inputs.clear()
            providers.step(loss, inputs)

        return run

    def without_compiler() -> None:
        with providers.uncompiled():
            step(providers.ours)()

    chosen: dict[str, Callable[[], Any]] = {
        "floor": lambda: products(inputs),
        "floor_tiled": lambda: tiled_products(inputs),
        "lens_kernels": step(providers.ours),
    }
    if uncompiled:
        chosen["lens_kernels_uncompiled"] = without_compiler
    chosen["dense"] = step(providers.dense)
    chosen["dense_kl_div"] = step(providers.dense_kl_div)
    return chosen


def products(inputs: providers.Inputs, backward: bool = True) -> None:
    """Make the four products of each pair; the student's logits stand in for their gradient.

    Without ``backward`` only the first two.
    """
    head = inputs.student_head.detach()
    for student, teacher in zip(inputs.student_hidden, inputs.teacher_hidden, strict=True):
        x = student.detach()
        logits = x @ head.t()
        teacher @ inputs.teacher_head.t()
        if backward:
            logits @ head
            logits.t() @ x


def tiled_products(inputs: providers.Inputs) -> None:
    """Do the same with the functions and the precision of the ``torch`` backend."""
    ours, theirs = (
        matmul.Factors(head.detach(), None, torch.float32)
        for head in (inputs.student_head, inputs.teacher_head)
    )
    d_head = torch.zeros(ours.weight.shape, device=ours.weight.device)
    shape = inputs.student_hidden[0].shape[0], d_head.shape[0]
    tile = torch.empty(shape, device=d_head.device)
    for student, teacher in zip(inputs.student_hidden, inputs.teacher_hidden, strict=True):
        x = ours.rows(student.detach())
        matmul.project(theirs.rows(teacher), theirs.weight, tile)
        matmul.project(x, ours.weight, tile)
        grad = tile.to(x.dtype)
        matmul.product(grad, ours.weight)
        matmul.add_head_gradient(grad, x, d_head)


def rows_of(job: providers.Job, timings: dict[str, harness.Timing]) -> list[dict[str, Any]]:
    """Return the lines of the CSV."""
    floor = timings["floor"]
    return [
        {
            "contender": contender,
            "pairs": job.pairs,
            "tokens": job.tokens,
            "vocab_entries": job.vocab,
            "student_width": job.student_width,
            "teacher_width": job.teacher_width,
            "dtype": str(job.dtype).removeprefix("torch."),
            "median_ms": f"{timing.median_ms:.1f}",
            "min_ms": f"{min(timing.times_ms):.1f}",
            "max_ms": f"{max(timing.times_ms):.1f}",
            "ratio_to_floor": f"{timing.median_ms / floor.median_ms:.2f}",
            "best_ratio_to_floor": f"{min(timing.times_ms) / min(floor.times_ms):.2f}",
            "rounds": len(timing.times_ms),
        }
        for contender, timing in timings.items()
    ]


if __name__ == "__main__":
    main()
