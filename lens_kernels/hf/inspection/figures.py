"""The pictures of an inspection: divergence and entropy by depth, and top tokens at every depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lens_kernels import pictures
from lens_kernels.failures import install
from lens_kernels.hf.inspection.reading import Inspection, Reading

FONT = pictures.STYLE["font.family"]
COLD, HOT = "#F1F5F8", pictures.BLUE
# Beyond this fraction of the colour scale, white text is easier to read than black text.
HOT_FROM = 0.85
MAX_LAYERS, MAX_POSITIONS = 32, 24
# The sizes of cells are in inches, and the size of the font is in points.
CELL_WIDTH, CELL_HEIGHT, FONT_SIZE = 0.66, 0.27, 7.5
# Without this option, matplotlib would read a token with two dollar signs as a formula.
TEXT: dict[str, Any] = {"fontfamily": FONT, "fontsize": FONT_SIZE, "parse_math": False}
CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}


def check_matplotlib() -> None:
    """Raise an error that says how to install matplotlib if it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"the pictures need matplotlib, which is not installed: {install('matplotlib')}"
        ) from error


def draw(result: Inspection, output: Path) -> None:
    """Draw the three pictures, and write them into the folder ``output``."""
    depth_figure(result, output / "divergence_by_depth.png")
    for role, reading in result.sides:
        lens_figure(result, role, reading, output / f"lens_{role}.png")


@pictures.styled
def depth_figure(result: Inspection, path: Path) -> None:
    """Draw two panels against relative depth: divergence, and entropy below it."""
    figure = pictures.canvas(6.4, 5.4)
    upper, lower = figure.subplots(2, sharex=True)
    student, teacher = result.student, result.teacher
    chosen = [c for c in result.comparisons if c.relative]
    trained = [c for c in result.comparisons if c.trained]
    trained_style = {"color": pictures.VERMILION, "linestyle": "", "marker": "D", "zorder": 3}
    for pairs, label, style in (
        (chosen, "equal relative depth", {"color": pictures.BLUE, "marker": "o"}),
        (trained, "lens pairs of training", trained_style),
    ):
        if pairs:
            depth = [c.student_depth / student.depths for c in pairs]
            upper.plot(depth, [c.mean for c in pairs], label=label, **style)
    for reading, label, style in (
        (student, "student", {"color": pictures.BLUE, "marker": "o"}),
        (teacher, "teacher", {"color": pictures.BLACK, "marker": "s"}),
    ):
        depth = [i / reading.depths for i in range(1, reading.depths + 1)]
        lower.plot(depth, reading.entropy.mean(1).tolist(), label=label, markersize=4, **style)
    upper.set_xlim(0, 1.03)
    upper.set_title(f"Divergence of student and teacher, mean over {len(result.ids)} positions")
    upper.set_ylabel(f"{result.divergence}, {unit(result.divergence)} ({pictures.LOWER})")
    lower.set_title("Entropy of each model's lens, mean over positions")
    lower.set_ylabel("entropy, nats")
    lower.set_xlabel("relative depth: block / number of blocks (1 is the model's output)")
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
        axes.legend()
    pictures.save(figure, path)


def unit(divergence: str) -> str:
    """Return the unit of a divergence, or its upper limit if it has no unit."""
    return "of at most 1" if divergence in ("tvd", "hellinger") else "nats"


def first_of(count: int, total: int) -> str:
    """Return in words how many of the text's tokens are shown."""
    return f"{count} of {total}" if count == total else f"the first {count} of {total}"


@pictures.styled
def lens_figure(result: Inspection, role: str, reading: Reading, path: Path) -> None:
    """Draw a table of the most likely next tokens, coloured by entropy.

    It has a row for each depth and a column for each position.
    """
    from matplotlib.colors import LinearSegmentedColormap

    depths = shown_depths(reading.depths)
    count = min(len(result.tokens), MAX_POSITIONS)
    size = (2.4 + CELL_WIDTH * max(count, 8), 1.9 + CELL_HEIGHT * max(len(depths), 4))
    figure = pictures.canvas(*size)
    axes = figure.subplots()
    entropy = reading.entropy[[i - 1 for i in depths], :count]
    # The colour scale needs a positive end even if every entropy is 0.
    end = result.max_entropy or 1.0
    image = axes.imshow(
        entropy.numpy(),
        cmap=LinearSegmentedColormap.from_list("entropy", [COLD, HOT]),
        vmin=0,
        vmax=end,
        aspect="auto",
        origin="lower",
        interpolation="none",  # otherwise SVG viewers would blur the edges between cells
    )
    for y, depth in enumerate(depths):
        for x in range(count):
            token, right = result.top(reading, depth, x)
            colour = "white" if entropy[y, x] > HOT_FROM * end else "black"
            weight = "bold" if right else "normal"
            axes.text(x, y, fit(token), color=colour, weight=weight, **CENTRED, **TEXT)
    axes.set_xticks(range(count), [fit(t) for t in result.tokens[:count]], **TEXT)
    axes.set_yticks(range(len(depths)), [str(i) for i in depths], **TEXT)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(f"block of {reading.depths}")
    axes.set_xlabel("token of the text")
    figure.suptitle(
        f"{role.capitalize()}: most likely next token by depth; bold: the text's next token"
        f"\n(blocks: {len(depths)} of {reading.depths};"
        f" tokens: {first_of(count, result.total_tokens)})"
    )
    figure.colorbar(image, label="entropy, nats (darker: less sure)", pad=0.01, aspect=40)
    pictures.save(figure, path)


def shown_depths(total: int) -> list[int]:
    """Return the depths to show: all, or if they are too many, evenly spaced ones and the last."""
    count = min(total, MAX_LAYERS)
    return [round(i * total / count) for i in range(1, count + 1)]


def fit(token: str) -> str:
    """Return a token's text as it fits in a cell. Missing glyphs become □, and long text is cut."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(FONT))
    font.set_size(FONT_SIZE, 72)
    known = font.get_charmap()
    text = "".join(c if ord(c) in known else "□" for c in token)
    cut = text
    while _points(font, cut) > (CELL_WIDTH - 0.1) * 72:
        text = text[:-1]
        cut = text + "…"
    return cut


def _points(font: Any, text: str) -> float:
    font.set_text(text)
    return font.get_width_height()[0] / 64  # the unit of FreeType is 1/64 of a point
