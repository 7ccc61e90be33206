"""A hook of mkdocs: the site mirrors the checkout, so that links work in both.

The pages are those of the navigation. Every file that a page links to is in the site too. Notebooks
become pages without outputs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PATTERN = "docs/notebooks/*.ipynb"
NOTEBOOKS = sorted(ROOT.glob(PATTERN))
STYLES = "docs/site/extra.css"
LINK = re.compile(r"\]\(([^)\s#]+)")
# These pictures show the state of a repository on its host, which a copy of the site cannot know.
BADGE = re.compile(r"^\[!\[.*\n", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Put the notebooks in the place of their pattern in the navigation."""
    pages = [str(path.with_suffix(".md").relative_to(ROOT)) for path in NOTEBOOKS]
    for section in config.nav:
        section |= {title: pages for title, content in section.items() if content == PATTERN}
    config.nav = [section for section in config.nav if all(section.values())]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Replace the files of docs/ by all pages of the checkout and the files that they link to."""
    named = _paths(config.nav)
    notebooks = {str(path.with_suffix(".md").relative_to(ROOT)): path for path in NOTEBOOKS}
    ours = [ROOT / path for path in named if path not in notebooks]
    ours += [path for page in ours for path in _linked(page)]
    made = [File.generated(config, name, content=_shown(x)) for name, x in notebooks.items()]
    # Files of the theme stay. They may be inside the checkout too, in a virtual environment.
    kept = [file for file in files if Path(config.docs_dir) not in Path(file.abs_src_path).parents]
    names = {str(path.relative_to(ROOT)) for path in [*ours, ROOT / STYLES]}
    return Files([*kept, *made, *(_file(name, config) for name in sorted(names))])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Remove the badges of a page."""
    return BADGE.sub("", markdown)


def _shown(notebook: Path) -> str:
    """Return a notebook as Markdown, without outputs."""
    cells = json.loads(notebook.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    shown = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join([*shown, f"This page is the notebook `{notebook.relative_to(ROOT)}`."])


def _file(name: str, config: Any) -> File:
    return File(name, str(ROOT), config.site_dir, config.use_directory_urls)


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [path for item in items for path in _paths(item)]


def _linked(page: Path) -> list[Path]:
    """Return the files of the checkout that a page links to."""
    links = LINK.findall(BADGE.sub("", page.read_text()))
    paths = ((page.parent / link).resolve() for link in links if "://" not in link)
    return [path for path in paths if path.is_file() and path.is_relative_to(ROOT)]
