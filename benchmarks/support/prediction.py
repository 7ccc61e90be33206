"""Predicts the time of a plan on an H100 from its operations and bytes. Nothing is measured.

A step takes as long as its arithmetic or its memory traffic, whichever is longer. Steps do not
overlap. The rates are assumptions. Data sheet of the H100 SXM: 989 TFLOP/s and 3.35 TB/s.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.support import environment, tables
from benchmarks.support.shapes import MODELS, Model
from lens_kernels import plan
from lens_kernels.cost import RELATIVE_TIME, Plan

BYTES_PER_MS = 3.0e9
# The assumed rate of 16-bit GEMMs with float32 results.
FLOPS_PER_MS = 700e9
# The assumed rate of 16-bit GEMMs with 16-bit results, when they are timed without the loss.
FLOOR_FLOPS_PER_MS = 790e9
PARTS = {
    "projections": "products",
    "products of the gradient": "products",
    "pointwise pass": "pass",
}
# Rows of the table: each model, with each number of tokens and of lens pairs.
SHAPES = ("qwen2.5", "llama3")
PAGE_SIZES = ((8192, 1), (5120, 1), (1024, 5))
READS = {"three times": False, "once": True}
# The number of instructions that all warps of the assumed GPU start per ms: 132 multiprocessors
# start 4 per cycle.
ISSUED_PER_MS = 132 * 4 * 1.75e6
HEADER = (
    "predicted, not measured",
    "tokens x pairs",
    "logits read",
    "projections",
    "row pass",
    "its instructions",
    "gradient products",
    "rest",
    "ms",
    "ms / four GEMMs",
)


def step_ms(planned: Plan) -> dict[str, float]:
    """Return the predicted time of each step in ms."""
    ms = dict.fromkeys((step.name for step in planned.steps), 0.0)
    for step in planned.steps:
        arithmetic = step.flops * RELATIVE_TIME[step.factor_bytes] / FLOPS_PER_MS
        ms[step.name] += max(arithmetic, step.bytes_moved / BYTES_PER_MS)
    return ms


def part_ms(planned: Plan) -> dict[str, float]:
    """Return the predicted ms of three parts: GEMMs, the pass between them, and the rest."""
    ms = {"products": 0.0, "pass": 0.0, "rest": 0.0}
    for name, time in step_ms(planned).items():
        ms[PARTS.get(name, "rest")] += time
    return ms


def total_ms(planned: Plan) -> float:
    """Return the predicted time of all steps together in ms."""
    return sum(step_ms(planned).values())


def of_floor(plans: Mapping[str, Plan]) -> float:
    """Return the predicted time of the ``torch`` backend, divided by that of its GEMMs alone."""
    return total_ms(plans["torch"]) / (plans["dense"].flops / FLOOR_FLOPS_PER_MS)


def instructions(one_read: bool) -> float:
    """Return how many instructions the row kernel has per pair of logits, counted for sm_90."""
    kernel = {"arch": "sm_90", "divergence": "jsd_half", "variant": "plain"}
    rows = tables.read_csv(environment.DATA / "offline" / "row_pass_bfloat16.csv")
    (row,) = (r for r in rows if kernel.items() <= r.items() and (r["cluster"] != "1") == one_read)
    return float(row["instructions_a_pair"])


def issue_ms(model: Model, rows: int, one_read: bool) -> float:
    """Return the time of the row kernel's instructions in ms. A warp has 32 threads."""
    return rows * model.vocab * instructions(one_read) / 32 / ISSUED_PER_MS


def table() -> str:
    """Return a Markdown table of predicted times.

    The times are for a bf16 step with ``jsd`` on the ``torch`` backend. The row kernel reads logits
    three times, or once if a cluster of GPU programs holds a row.
    """
    rows = []
    for key in SHAPES:
        model = MODELS[key]
        sizes = model.vocab, model.student, model.teacher
        for tokens, pairs in PAGE_SIZES:
            for reads, one_read in READS.items():
                plans = plan(tokens, *sizes, pairs=pairs, one_read=one_read)
                times = [*step_ms(plans["torch"]).values()]
                issue = issue_ms(model, tokens * pairs, one_read)
                first, second, *rest = times
                shown = [f"{time:.1f}" for time in (first, second, issue, *rest, sum(times))]
                name = [model.name, f"{tokens} x {pairs}", reads]
                rows.append([*name, *shown, f"{of_floor(plans):.2f}"])
    return tables.markdown_table(HEADER, rows)
