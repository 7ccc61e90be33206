"""Writes an inspection as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

from lens_kernels.hf.inspection.figures import HOT_FROM, first_of, unit
from lens_kernels.hf.inspection.reading import Inspection, Reading
from lens_kernels.visible import WHITE, visible

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2530; --soft: #5a6672; --line: #d5dbe1;
  --cold: #f1f5f8; --hot: #0072b2; --mark: #d55e00; --on-hot: #fff; }
@media (prefers-color-scheme: dark) { :root { --page: #12171c; --ink: #e6ebf0; --soft: #9fabb7;
  --line: #36414c; --cold: #1b2229; --hot: #0072b2; --mark: #f0917c; } }
html { scroll-padding-bottom: 14rem; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 70ch; }
blockquote { margin: .5rem 0 1rem; padding: .5rem .75rem; border-left: 3px solid var(--hot);
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12rem; overflow: auto; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; border-radius: 6px; }
.box { overflow: auto; max-height: max(20rem, 100vh - 16rem);
  scroll-padding: 2rem 1rem 2rem 4rem; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 1px; }
.lens { font: 12px/1.3 ui-monospace, monospace; }
.lens th, .lens td { padding: .2rem .3rem; white-space: pre; unicode-bidi: isolate;
  max-width: 11ch; overflow: hidden; text-overflow: ellipsis; text-align: center; }
.lens th { font-weight: 500; color: var(--soft); background: var(--page); }
.lens tbody th { position: sticky; left: 0; text-align: right; min-width: 3.5ch; }
.lens thead th { position: sticky; top: 0; } .lens tfoot th { position: sticky; bottom: 0; }
.lens thead th:first-child, .lens tfoot th:first-child { left: 0; z-index: 2; }
.lens td { cursor: default; color: var(--ink);
  background: color-mix(in srgb, var(--hot) calc(var(--h) * 1%), var(--cold)); }
.lens td.hot { color: var(--on-hot); }
.lens td.right { font-weight: 700; box-shadow: inset 0 -2px var(--mark); }
.lens td:focus, .lens td:hover { outline: 2px solid var(--mark); outline-offset: -2px; }
.pairs td, .pairs th { padding: .15rem .7rem; text-align: right; white-space: nowrap; }
.pairs { font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; align-items: center;
  font-size: .85rem; color: var(--soft); margin: .3rem 0 .5rem; }
.ramp { display: inline-block; width: 7rem; height: .8rem; vertical-align: middle;
  border: 1px solid var(--line); background: linear-gradient(90deg, var(--cold), var(--hot)); }
.swatch { border-bottom: 2px solid var(--mark); font-weight: 700; }
#detail { position: sticky; bottom: 0; margin: 1rem 0 0; padding: .5rem .75rem; min-height: 11.2em;
  max-height: 45vh; overflow: auto; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; box-shadow: 0 -2px 12px #0003; font: 12px/1.4 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; box-sizing: border-box; z-index: 3; }
"""

# Arrow keys move between the cells of a table. Only one cell is a tab stop, so that the Tab key
# leaves the table.
SCRIPT = """
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const detail = document.getElementById("detail");
const show = (e) => {
  const cell = e.target.closest(".lens td");
  if (cell) detail.textContent = cell.dataset.detail;
};
document.addEventListener("mouseover", show);
document.addEventListener("focusin", show);
document.addEventListener("click", (e) => e.target.closest(".lens td")?.focus());
document.addEventListener("keydown", (e) => {
  const cell = e.target.closest(".lens td");
  const [down, right] = STEPS[e.key] ?? [0, 0];
  if (!cell || !(down || right)) return;
  e.preventDefault();
  const body = cell.closest("tbody");
  const row = body.rows[cell.parentNode.sectionRowIndex + down];
  const next = row?.cells[cell.cellIndex + right];
  if (next?.tagName !== "TD") return;
  body.querySelector("td[tabindex='0']").tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
"""


# This policy allows only this script, and no loading of files, whatever texts and names the page
# has.
DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:;"
    f" style-src 'unsafe-inline'; script-src 'sha256-{DIGEST}'"
)


def write(result: Inspection, output: Path) -> None:
    """Write ``inspect.html`` to the folder ``output``, with the divergence picture inside."""
    picture = base64.b64encode((output / "divergence_by_depth.png").read_bytes()).decode()
    (output / "inspect.html").write_text(page(result, picture), encoding="utf-8")


def page(result: Inspection, picture: str) -> str:
    """Return the HTML text of the page. ``picture`` is a PNG in base64."""
    title = "Student and teacher through the logit lens"
    models = " and ".join(
        f"the {role} <b>{escape(visible(reading.name))}</b> ({reading.depths} blocks)"
        for role, reading in result.sides
    )
    tables = "".join(_section(result, role, reading) for role, reading in result.sides)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>The next token that {models} predict if the head reads each block's output.
Tokens read: {first_of(len(result.tokens), result.total_tokens)}.</p>
<blockquote>{escape(visible(result.text, keep=WHITE))}</blockquote>
<figure><img alt="Divergence and entropy against relative depth; the numbers are in the table below"
src="data:image/png;base64,{picture}"></figure>
{_pairs(result)}
{tables}
<pre id="detail" role="status">
Point at a cell for details, or tab into a table and use the arrow keys.</pre>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _pairs(result: Inspection) -> str:
    rows = "".join(
        f"<tr><td>{c.student_depth}</td><td>{c.teacher_depth}</td><td>{c.mean:.4f}</td>"
        f"<td>{'yes' if c.trained else ''}</td></tr>\n"
        for c in result.comparisons
    )
    name = f"{escape(result.divergence)}, {unit(result.divergence)}"
    return f"""<details><summary>The divergences as a table</summary>
<div class="box" tabindex="0"><table class="pairs"><thead><tr><th scope="col">student block</th>
<th scope="col">teacher block</th><th scope="col">{name}</th><th scope="col">trained pair</th></tr>
</thead><tbody>{rows}</tbody></table></div></details>"""


def _section(result: Inspection, role: str, reading: Reading) -> str:
    top = result.max_entropy or 1.0
    following = [*result.tokens[1:], ""]
    first = True
    rows = []
    for depth in range(reading.depths, 0, -1):
        cells = []
        for x in range(len(result.tokens)):
            heat = 100 * reading.entropy[depth - 1, x].item() / top
            token, right = result.top(reading, depth, x)
            classes = " ".join(["hot"] * (heat > 100 * HOT_FROM) + ["right"] * right)
            cells.append(
                f'<td tabindex="{0 if first else -1}" class="{classes}" style="--h:{heat:.0f}"'
                f' data-detail="{escape(detail(result, role, reading, depth, x))}">'
                f"{escape(token)}</td>"
            )
            first = False
        rows.append(f'<tr><th scope="row">{depth}</th>{"".join(cells)}</tr>\n')
    return f"""<h2>{role.capitalize()}: most likely next token, by block and position</h2>
<div class="legend"><span>entropy 0 <span class="ramp"></span> {top:.2f} nats</span>
<span><span class="swatch">token</span> is the text's next token</span>
<span>␣ space, ⏎ line end, ⇥ tab, ∅ token without text</span></div>
<div class="box"><table class="lens">
<thead><tr><th scope="row">next</th>{_heads(following)}</tr></thead>
<tbody>
{"".join(rows)}</tbody>
<tfoot><tr><th scope="row">text</th>{_heads(result.tokens)}</tr></tfoot>
</table></div>
"""


def _heads(tokens: list[str]) -> str:
    return "".join(f'<th scope="col">{escape(t)}</th>' for t in tokens)


def detail(result: Inspection, role: str, reading: Reading, depth: int, x: int) -> str:
    """Return the details of a cell, as text with several lines."""
    lines = [f"{role}, block {depth} of {reading.depths}, after token {x + 1}: {result.tokens[x]}"]
    ids, probs = reading.top_ids[depth - 1, x].tolist(), reading.top_probs[depth - 1, x].tolist()
    lines += [f"{100 * p:7.2f} %  {result.top_tokens[i]}" for i, p in zip(ids, probs, strict=True)]
    line = f"entropy {reading.entropy[depth - 1, x].item():.3f} nats"
    if x + 1 < len(result.tokens):
        share = 100 * reading.next_prob[depth - 1, x].item()
        line += f"; the text's next token, {result.tokens[x + 1]}, has {share:.2f} %"
    lines.append(line)
    other = "teacher" if role == "student" else "student"
    for c in result.comparisons:
        own, its = c.student_depth, c.teacher_depth
        if role == "teacher":
            own, its = its, own
        if own == depth:
            value = f"{result.divergence} {c.divergence[x].item():.4f}"
            lines.append(f"{value} against {other} block {its}" + ", a trained pair" * c.trained)
    return "\n".join(lines)
