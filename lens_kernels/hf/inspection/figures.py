"""Pictures of an inspection: quantities by depth, and the most likely token at every depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lens_kernels import pictures
from lens_kernels.failures import install
from lens_kernels.hf.inspection.results import QUANTITIES, TEACHER, Inspection

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font

FONT = pictures.STYLE["font.family"]
# Colours and markers of all models except the teacher.
MODELS = (
    (pictures.BLUE, "o"),
    (pictures.ORANGE, "^"),
    (pictures.GREEN, "v"),
    (pictures.PURPLE, "P"),
    (pictures.SKY, "X"),
)
TRAINED = {"color": pictures.VERMILION, "linestyle": "", "marker": "D", "zorder": 3}
TRAINED["label"] = "lens pairs of training"
COLD, HOT = "#F1F5F8", pictures.BLUE
# Text is white on cells above 85 % of the colour scale, because black text would be hard to read.
HOT_FROM = 0.85
MAX_LAYERS, MAX_POSITIONS = 32, 24
# The size of a cell in inches, and of its font in points.
CELL_WIDTH, CELL_HEIGHT, FONT_SIZE = 0.66, 0.27, 7.5
# Without parse_math=False, matplotlib would read a token with two dollar signs as a formula.
TEXT: dict[str, Any] = {"fontfamily": FONT, "fontsize": FONT_SIZE, "parse_math": False}
CENTRED = {"ha": "center", "va": "center"}


def check_matplotlib() -> None:
    """Raise an error that says how to install matplotlib if it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"the pictures need matplotlib, which is not installed: {install('matplotlib')}"
        ) from error


def draw(result: Inspection) -> dict[str, Figure]:
    """Return the pictures of an inspection as matplotlib figures, by name."""
    drawn = {"lens_by_depth": depth_figure(result)}
    if result.passages[0].comparisons:
        drawn["divergence_by_depth"] = divergence_figure(result)
    for label in result.names:
        drawn[f"lens_{label.replace(' ', '_')}"] = lens_figure(result, label)
    return drawn


def style_of(result: Inspection, label: str) -> dict[str, Any]:
    """Return the colour, the marker and the label of a model's lines."""
    colour, marker = (pictures.BLACK, "s")
    if label != TEACHER:
        students = [x for x in result.names if x != TEACHER]
        colour, marker = MODELS[students.index(label) % len(MODELS)]
    name = result.names[label]
    return {"color": colour, "marker": marker, "markersize": 4, "label": f"{label} ({name})"}


@pictures.styled
def depth_figure(result: Inspection) -> Figure:
    """Draw entropy, KL, and probability and rank of the right token against relative depth."""
    shown = [x for x in QUANTITIES if result.values(next(iter(result.names)), x).shape[1]]
    rows = (len(shown) + 1) // 2
    figure = pictures.canvas(8.8, 0.9 + 2.6 * rows)
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False).flat
    for axes, quantity in zip(panels, shown, strict=True):
        for label in result.names:
            low, median, high = result.quartiles(label, quantity).tolist()
            depth = [i / len(median) for i in range(1, len(median) + 1)]
            style = style_of(result, label)
            axes.plot(depth, median, **style)
            axes.fill_between(depth, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_ylabel(QUANTITIES[quantity])
        axes.margins(y=0.08)
        if quantity == "next_rank":
            pictures.log_axis(axes)
        else:
            axes.set_ylim(bottom=0)
    for axes in panels[-2:]:
        axes.set_xlabel("block / number of blocks (1: the model's output)")
    count = result.values(next(iter(result.names)), "entropy").shape[1]
    figure.suptitle(f"The lens by depth: median and quartiles over {count} tokens")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)))
    return figure


@pictures.styled
def divergence_figure(result: Inspection) -> Figure:
    """Draw the divergence of each model from the teacher against relative depth."""
    figure = pictures.canvas(6.4, 4.0)
    axes = figure.subplots()
    for label in result.passages[0].comparisons:
        pairs, style = result.compared(label), style_of(result, label)
        kinds = (
            ([c for c in pairs if c.relative], style),
            ([c for c in pairs if c.trained], style | TRAINED),
        )
        for some, look in kinds:
            if some:
                depth = [c.student_depth / result.depths(label) for c in some]
                axes.plot(depth, [c.mean for c in some], **look)
    count = len(pairs[0].divergence)
    axes.set_ylim(0, 1.15 * axes.dataLim.y1 or 1)  # leave space above the highest point
    axes.set_title(f"Divergence from the teacher at equal relative depth, mean over {count} tokens")
    axes.set_ylabel(f"{result.divergence}, {unit(result.divergence)} ({pictures.LOWER})")
    axes.set_xlabel("block / number of blocks (1: the model's output)")
    handles = {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    return figure


def unit(divergence: str) -> str:
    """Return the unit of a divergence, or its upper limit if it has no unit."""
    return "of at most 1" if divergence in ("tvd", "hellinger") else "nats"


def first_of(count: int, total: int) -> str:
    """Return a text that states how many of a passage's tokens are shown."""
    return f"{count} of {total}" if count == total else f"the first {count} of {total}"


@pictures.styled
def lens_figure(result: Inspection, label: str) -> Figure:
    """Draw the predictions for the first text by depth and position, coloured by entropy."""
    from matplotlib.colors import LinearSegmentedColormap

    passage = result.passages[0]
    reading = passage.readings[label]
    depths = shown_depths(reading.depths)
    count = min(len(passage.tokens), MAX_POSITIONS)
    size = (2.4 + CELL_WIDTH * max(count, 8), 1.9 + CELL_HEIGHT * max(len(depths), 4))
    figure = pictures.canvas(*size)
    axes = figure.subplots()
    entropy = reading.entropy[[i - 1 for i in depths], :count]
    low, high = result.scale
    image = axes.imshow(
        entropy.numpy(),
        cmap=LinearSegmentedColormap.from_list("entropy", [COLD, HOT]),
        vmin=low,
        vmax=high,
        aspect="auto",
        origin="lower",
        interpolation="none",  # with interpolation, SVG viewers blur the edges between cells
    )
    hot = result.heat(entropy) > HOT_FROM
    for y, depth in enumerate(depths):
        for x in range(count):
            token, right = result.top(passage, label, depth, x)
            colour = "white" if hot[y, x] else "black"
            weight = "bold" if right else "normal"
            axes.text(x, y, fit(token), color=colour, weight=weight, **CENTRED, **TEXT)
    axes.set_xticks(range(count), [fit(t) for t in passage.tokens[:count]], **TEXT)
    axes.set_yticks(range(len(depths)), [str(i) for i in depths], **TEXT)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(f"block ({len(depths)} of {reading.depths})")
    axes.set_xlabel(f"token of the text ({first_of(count, passage.total_tokens)})")
    axes.set_title(f"{label.capitalize()}: most likely next token (bold: correct)")
    figure.colorbar(image, label="entropy, nats", pad=0.01, aspect=40, extend="both")
    return figure


def shown_depths(total: int) -> list[int]:
    """Return all depths, or if there are too many, evenly spaced depths and the last."""
    count = min(total, MAX_LAYERS)
    return [round(i * total / count) for i in range(1, count + 1)]


def fit(token: str) -> str:
    """Cut a token's text to the size of a cell. Characters that the font lacks become □."""
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


def _points(font: FT2Font, text: str) -> float:
    font.set_text(text)
    return font.get_width_height()[0] / 64  # FreeType's unit is 1/64 of a point
