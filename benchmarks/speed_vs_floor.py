"""Time of loss and backward against the floor: the four products with the heads alone.

    python benchmarks/speed_vs_floor.py                          about a minute on two cores
    python benchmarks/speed_vs_floor.py --uncompiled --bf16      more rows

The floor projects student and teacher and makes the gradients of hidden states and head, each by
one ``torch.mm`` of plain operands in the dtype of the row. ``floor_tiled`` does the same by the
backend's own functions, which on a CPU cut the projections into tiles because that is faster there,
and which work in fp32 on every device that cannot sum 16-bit products in fp32.

Ratios are those of the medians. ``best_ratio_to_floor`` is that of the quickest rounds: on a busy
machine these are the ones to look at.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import environment, products, providers, tables, timing
from benchmarks.support.contenders import check, step
from benchmarks.support.shapes import Job

COLUMNS = (
    "contender pairs tokens vocab_entries student_width teacher_width dtype median_ms min_ms max_ms"
    " ratio_to_floor best_ratio_to_floor rounds"
)
SHOWN = "contender dtype median_ms min_ms max_ms ratio_to_floor best_ratio_to_floor"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    start = time.perf_counter()
    device = torch.device(args.device)
    for key in ("lens_kernels", "dense", "dense_kl_div"):
        check(providers.CONTENDERS[key], device)
    rows: list[dict[str, Any]] = []
    widths = args.student_width, args.teacher_width
    for dtype in (torch.float32, torch.bfloat16) if args.bf16 else (torch.float32,):
        job = Job(args.tokens, args.vocab, args.pairs, *widths, dtype, device)
        print(f"{job.tokens} tokens, {job.vocab} entries, {job.columns()['dtype']}")
        timings = timing.time_interleaved(functions(job, args.uncompiled), args.rounds, device)
        floor = timings["floor"]
        for name, times in timings.items():
            best = min(times.by_round.values()) / min(floor.by_round.values())
            names = {"contender": name, "best_ratio_to_floor": f"{best:.2f}"}
            rows.append(tables.row(COLUMNS, names, job.columns(), times.columns(1, floor)))
    path = args.out / "speed_vs_floor.csv"
    where = environment.environment(device)
    tables.write_csv(path, [row | where for row in rows])
    print()
    tables.print_rows(rows, SHOWN.split())
    print(f"\n{path}\n{time.perf_counter() - start:.0f} s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = environment.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--student-width", type=int, default=768)
    parser.add_argument("--teacher-width", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one to warm up")
    parser.add_argument("--bf16", action="store_true", help="also with bfloat16 inputs")
    parser.add_argument("--uncompiled", action="store_true", help="also without the compiler")
    return parser.parse_args(argv)


def functions(job: Job, uncompiled: bool) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name, on shared inputs."""
    inputs = job.make()

    def uncompiled_step() -> None:
        with providers.uncompiled():
            step(providers.ours, inputs)

    chosen: dict[str, Callable[[], Any]] = {
        "floor": partial(products.products, inputs),
        "floor_tiled": partial(products.tiled_products, inputs),
        "lens_kernels": partial(step, providers.ours, inputs),
    }
    if uncompiled:
        chosen["lens_kernels_uncompiled"] = uncompiled_step
    chosen["dense"] = partial(step, providers.dense, inputs)
    chosen["dense_kl_div"] = partial(step, providers.dense_kl_div, inputs)
    return chosen


if __name__ == "__main__":
    main()
