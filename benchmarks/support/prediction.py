"""Predicts the time of a plan on an H100 from its operations and bytes. Nothing is measured.

A step takes as long as its arithmetic or its memory traffic, whichever is longer. Steps do not
overlap. The rates are assumptions. Data sheet of the H100 SXM: 989 TFLOP/s and 3.35 TB/s.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.support import environment, tables
from benchmarks.support.shapes import MODELS, Model
from lens_kernels import cost, plan
from lens_kernels.backends.torch.layout import BLOCK, Layout, grad_stride
from lens_kernels.cost import RELATIVE_TIME, CallShape, Plan, Step
from lens_kernels.options import Divergence

BYTES_PER_MS = 3.0e9
# The assumed rate of 16-bit GEMMs with float32 results.
FLOPS_PER_MS = 700e9
# The assumed rate of 16-bit GEMMs with 16-bit results, when they are timed without the loss.
FLOOR_FLOPS_PER_MS = 790e9
PARTS = {
    "projections": "products",
    "hidden gradients": "products",
    "head gradient": "products",
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
    "hidden gradients",
    "head gradient",
    "rest",
    "ms",
    "ms / four GEMMs",
)
# Rows of a tile of logits and of a buffer of gradients. The first is the default for 16-bit heads.
BUFFERS = ((512, 1024), (384, 1536), (256, 2048), (512, 2048))
BUFFERS_TOKENS = 8192
BUFFERS_HEADER = (
    "rows of a tile",
    "rows of a buffer",
    "GiB",
    "with sums",
    "projections",
    "hidden gradients",
    "head gradient",
    "ms",
)


def step_ms(planned: Plan) -> dict[str, float]:
    """Return the predicted time of each step in ms."""
    ms = dict.fromkeys((step.name for step in planned.steps), 0.0)
    for step in planned.steps:
        ms[step.name] += max(two_times(step))
    return ms


def two_times(step: Step) -> tuple[float, float]:
    """Return the predicted ms of a step's arithmetic, and of its memory traffic."""
    arithmetic = step.flops * RELATIVE_TIME[step.factor_bytes] / FLOPS_PER_MS
    return arithmetic, step.bytes_moved / BYTES_PER_MS


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


def with_buffers(tile_rows: int, grad_rows: int) -> tuple[Plan, int]:
    """Return the plan of a step at Llama-3's size with other buffers, and the memory it holds.

    The memory, in bytes, includes what float32 gradients hold beyond bfloat16 gradients.
    """
    model = MODELS["llama3"]
    sizes = BUFFERS_TOKENS, model.vocab, model.student, model.teacher
    shape = CallShape(
        *sizes, (Divergence.JSD,), torch.bfloat16, torch.float32, True, True,
        torch.device("cuda"), workspace_bytes=0,
    )  # fmt: skip
    layout = Layout(tile_rows, grad_rows, BLOCK, True, grad_stride(model.vocab))
    planned = cost.row_chunks(shape, layout)
    gradients = (model.vocab + BUFFERS_TOKENS) * model.student
    more = torch.float32.itemsize - torch.bfloat16.itemsize
    return planned, planned.workspace_bytes + more * gradients


def buffers_table() -> str:
    """Return a Markdown table of the memory and time of tiles and buffers of other sizes."""
    rows = []
    for tile_rows, grad_rows in BUFFERS:
        planned, held = with_buffers(tile_rows, grad_rows)
        sizes = [f"{size / 2**30:.2f}" for size in (planned.workspace_bytes, held)]
        products = [two_times(step) for step in planned.steps if step.flops]
        shown = [f"{arithmetic:.1f} / {traffic:.1f}" for arithmetic, traffic in products]
        rows.append([str(tile_rows), str(grad_rows), *sizes, *shown, f"{total_ms(planned):.1f}"])
    return tables.markdown_table(BUFFERS_HEADER, rows)
