"""Time of loss and backward against the floor: the time of their four GEMMs alone.

    python benchmarks/speed_vs_floor.py                          about a minute on two cores
    python benchmarks/speed_vs_floor.py --uncompiled --bf16      more rows

The floor runs each GEMM as one ``torch.mm`` in the dtype of the table row. ``floor_tiled`` runs the
GEMMs of the ``torch`` backend, which work in tiles on a CPU because that is faster. They use fp32
if the device has no 16-bit GEMM with fp32 accumulation. The first round is not timed. Ratios are
ratios of medians. On a busy machine use ``best_ratio_to_floor``, the ratio of the fastest rounds.
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
    """Time the functions, then print the table and write the CSV."""
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
    """Return the parsed command-line arguments."""
    sizes = {"tokens": 1024, "vocab": 50257, "pairs": 1, "student_width": 768}
    parser = environment.parser(__doc__, True, **sizes, teacher_width=1600, rounds=3)
    parser.add_argument("--bf16", action="store_true", help="also with bfloat16 inputs")
    parser.add_argument("--uncompiled", action="store_true", help="also without the compiler")
    return parser.parse_args(argv)


def functions(job: Job, uncompiled: bool) -> dict[str, Callable[[], Any]]:
    """Return the functions to time, by name. All of them use the same inputs."""
    inputs = job.make()
    ours = partial(step, providers.ours, inputs)

    def ours_uncompiled() -> None:
        with providers.uncompiled():
            ours()

    return {
        "floor": partial(products.products, inputs),
        "floor_tiled": partial(products.tiled_products, inputs),
        "lens_kernels": ours,
        **({"lens_kernels_uncompiled": ours_uncompiled} if uncompiled else {}),
        "dense": partial(step, providers.dense, inputs),
        "dense_kl_div": partial(step, providers.dense_kl_div, inputs),
    }


if __name__ == "__main__":
    main()
