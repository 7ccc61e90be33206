"""The style of all pictures of the library and its benchmarks: colours, fonts, panels and files.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. matplotlib is
imported at the first picture, because the import is slow.
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
TICKS = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
# Hollow markers show values that were counted and not measured.
HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 1.4}
STYLE: Any = {
    # DejaVu Sans comes with matplotlib, so pictures look the same everywhere.
    "font.family": "DejaVu Sans",
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
    # without a fixed salt, each run would write a different SVG file
    "svg.hashsalt": "lens_kernels",
}


def shades(count: int) -> list[Any]:
    """Return colours from dark to light, for lines that have an order."""
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1) * 0.85) for i in range(count)]


def styled(draw: Callable[..., T]) -> Callable[..., T]:
    """Make a function draw with the settings in ``STYLE``."""

    @functools.wraps(draw)
    def drawn(*args: Any, **options: Any) -> T:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return drawn


def canvas(width: float, height: float) -> Any:
    """Return an empty figure with a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def log_axis(axes: Any) -> None:
    """Make the vertical axis logarithmic, with plain numbers instead of powers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # 1, 10, 100 for a wide range, else 1, 2, 5, 10
    ticks = TICKS[::3] if high > 1000 * low else TICKS
    inside = [y for y in ticks if low <= y <= high]
    axes.set_yticks(inside, minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("" if len(inside) > 1 else "{x:g}")


def save(figure: Any, path: Path) -> None:
    """Write a figure to ``path`` as PNG, and beside it as SVG."""
    figure.savefig(path)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
