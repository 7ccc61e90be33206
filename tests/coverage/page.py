"""Writes the text of docs/models.md from the table of checked types."""

from __future__ import annotations

import re
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


def made_with() -> str:
    """Return the version of transformers that the page names."""
    found = re.search(r"types of transformers ([\d.]+)", PAGE.read_text(encoding="utf-8"))
    assert found is not None
    return found.group(1).rstrip(".")


def older(rows: list[dict[str, str]], others: list[dict[str, str]]) -> str:
    """Return the section on older versions: how many types have a lens, and which types differ."""
    newest = {(row["group"], row["type"]): row["lens"] for row in rows}
    text = (
        "\n## Older versions of transformers\n\nOnly the lens was checked. *Not built*: the tiny\n"
    )
    text += "config, which is made for the newest version, does not fit the older one.\n"
    names = [x for x in others[0] if x not in ("group", "type")]
    for name in sorted(names, key=lambda x: [int(i) for i in x.split(".")]):
        listed = [row for row in others if row[name]]
        counts = []
        for group, title in GROUPS.items():
            own = [row[name] for row in listed if row["group"] == group]
            counts.append(
                f"{own.count('yes')} of {len(own)} {title.lower().replace(', on text', '')}"
            )
        differing = [
            f"`{row['type']}` ({row[name]})"
            for row in listed
            if row[name] != newest.get((row["group"], row["type"]), row[name])
        ]
        text += f"\n- **{name}**: {' and '.join(counts)} have a lens."
        text += f" Results that differ from those above: {', '.join(differing) or 'none'}."
    return text + "\n"


def page(
    rows: list[dict[str, str]], version: str, others: list[dict[str, str]] | None = None
) -> str:
    """Return the text of the page for the rows of the table and of older versions."""
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
    return text + (older(rows, others) if others else "")
