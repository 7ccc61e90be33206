"""Writes an inspection as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from lens_kernels.hf.inspection.figures import HOT_FROM, first_of, unit
from lens_kernels.hf.inspection.results import TEACHER, Inspection, Passage
from lens_kernels.visible import visible

SHOWN = 4  # maximum number of texts with tables on the page
TEMPLATE, SCRIPT = (
    Path(__file__).with_suffix(kind).read_text(encoding="utf-8") for kind in (".html", ".js")
)
# The page's content security policy allows only SCRIPT to run, and forbids loading files. So texts
# and model names on the page cannot run code.
DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:;"
    f" style-src 'unsafe-inline'; script-src 'sha256-{DIGEST}'"
)
ALTS = {
    "lens_by_depth": "Entropy, KL, and probability and rank of the right token by depth",
    "divergence_by_depth": "Divergence by depth; the numbers are in the table below",
}


def page(result: Inspection, pictures: Mapping[str, bytes]) -> str:
    """Return the HTML page of an inspection. ``pictures`` are SVG texts, by name."""
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["visible"] = visible
    return environment.from_string(TEMPLATE).render(
        title="Models through the logit lens",
        policy=POLICY,
        script=Markup(SCRIPT),
        result=result,
        shown=result.passages[:SHOWN],
        pictures=[(ALTS[x], base64.b64encode(pictures[x]).decode()) for x in ALTS if x in pictures],
        rows=lambda passage, label: _rows(result, passage, label),
        first_of=first_of,
        unit=unit(result.divergence),
    )


def _rows(
    result: Inspection, passage: Passage, label: str
) -> Iterator[tuple[int, list[dict[str, str]]]]:
    heat = result.heat(passage.readings[label].entropy).tolist()
    for depth in range(result.depths(label), 0, -1):
        cells = []
        for x, share in enumerate(heat[depth - 1]):
            token, right = result.top(passage, label, depth, x)
            cells.append(
                {
                    "token": token,
                    "heat": f"{100 * share:.0f}",
                    "classes": " ".join(["hot"] * (share > HOT_FROM) + ["right"] * right),
                    "detail": detail(result, passage, label, depth, x),
                }
            )
        yield depth, cells


def detail(result: Inspection, passage: Passage, label: str, depth: int, x: int) -> str:
    """Return the lines that the page shows when a reader chooses a table cell."""
    reading = passage.readings[label]
    lines = [
        f"{label}, block {depth} of {reading.depths}, after token {x + 1}: {passage.tokens[x]}"
    ]
    ids, probs = reading.top_ids[depth - 1, x].tolist(), reading.top_probs[depth - 1, x].tolist()
    lines += [f"{100 * p:7.2f} %  {result.top_tokens[i]}" for i, p in zip(ids, probs, strict=True)]
    entropy, kl = reading.entropy[depth - 1, x].item(), reading.final_kl[depth - 1, x].item()
    lines.append(f"entropy {entropy:.3f} nats; KL to the final layer {kl:.3f} nats")
    if x + 1 < len(passage.tokens):
        share, rank = 100 * reading.next_prob[depth - 1, x].item(), reading.next_rank[depth - 1, x]
        lines.append(f"right token: {passage.tokens[x + 1]}, {share:.2f} %, rank {rank}")
    for student, comparisons in passage.comparisons.items():
        for c in comparisons:
            own, its, other = c.student_depth, c.teacher_depth, TEACHER
            if label == TEACHER:
                own, its, other = its, own, student
            if own == depth and label in (student, TEACHER):
                value = f"{result.divergence} {c.divergence[x].item():.4f}"
                lines.append(
                    f"{value} against {other} block {its}" + ", a trained pair" * c.trained
                )
    return "\n".join(lines)
