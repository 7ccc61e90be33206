"""The style of every picture of the library and the benchmarks: colours, fonts, panels and files.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. matplotlib is
imported when the first picture is drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY, LIGHT_GREY = "#666666", "#A6A6A6"
LOWER = "lower is better"
# Hollow markers show values that are counted instead of measured.
HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 1.4}
STYLE: Any = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so pictures look the same everywhere
    "font.size": 9.0,
    "figure.titlesize": 11.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 144,
    "svg.hashsalt": "lens_kernels",  # makes SVG files reproducible
}


def styled(draw: Callable[..., T]) -> Callable[..., T]:
    """Decorate a function so that its pictures have the style ``STYLE``."""

    @functools.wraps(draw)
    def drawn(*args: Any, **options: Any) -> T:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return drawn


def canvas(width: float, height: float) -> Any:
    """Return an empty figure. The size is in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG to ``path`` and as SVG next to it."""
    figure.savefig(path)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
