"""Writes the text of docs/models.md from the table of checked types."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
GROUPS = {"causal": "Causal language models", "image-text": "Image-text models, on text"}
COLUMNS = ("lens", "step", "copy", "padding", "checkpointing")

HEAD = """# Model types

Which types of transformers {version} have a lens. A tiny model of each type, with random norms and
small soft caps, was built and checked on a CPU. `python -m tests.coverage` makes the table
(`tests/coverage/table.csv`) and this page.

- **lens**: the lens is found and gives the model's logits, in float32, bfloat16 and float16.
- **step**: loss and gradients of one step agree with a float64 loss of the model's own logits.
- **copy**: `shallow_copy` of three blocks computes what the model computes without the others.
- **padding**: padding on the right does not change the states of the tokens before it.
- **checkpointing**: gradient checkpointing does not change the gradients.

*Not built* and *not run*: no tiny model of this type could be built or run on tokens here, so
nothing is known. Image-text models were checked on text only.
"""


def page(rows: list[dict[str, str]], version: str) -> str:
    """Return the text of the page for these rows of the table."""
    text = HEAD.format(version=version)
    for group, title in GROUPS.items():
        own = [row for row in rows if row["group"] == group]
        served = [row for row in own if row["lens"] == "yes"]
        text += f"\n## {title}\n\n{len(served)} of {len(own)} types have a lens.\n\n"
        every = [row["type"] for row in served if all(row[x] == "yes" for x in COLUMNS)]
        text += "All checks pass: " + ", ".join(f"`{name}`" for name in every) + ".\n"
        some = [row for row in own if row["type"] not in every]
        text += f"\n| type | {' | '.join(COLUMNS)} | why not |\n|{'---|' * (len(COLUMNS) + 2)}\n"
        for row in some:
            cells = [row[x] for x in COLUMNS]
            why = row["why"].replace("|", "\\|").replace("<", "&lt;")
            text += f"| `{row['type']}` | {' | '.join(cells)} | {why} |\n"
    return text
