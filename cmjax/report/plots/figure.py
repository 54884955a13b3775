"""What all figures share: size, colours that colour-blind readers tell apart, and saving.

Figures are made without pyplot, so importing or drawing leaves matplotlib's global state alone.
Colours are Okabe and Ito's (jfly.uni-koeln.de/color, 2008).
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from cmjax.files import replaced
from cmjax.report.figure_path import checked_path

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#8A8A8A"
INK, FAINT, PALE = "#222222", "#666666", "#EFEFEF"

BLOCK_COLOURS = {
    "attention": BLUE,
    "router": YELLOW,
    "dispatch": ORANGE,
    "experts": GREEN,
    "combine": VERMILION,
    "shared": "#7FCDB4",
    "dense_ffn": SKY,
    "lm_head": PURPLE,
    "sample": "#E3BDD2",
    "mtp": "#5B5B5B",
    "embed": "#BDBDBD",
    "other": GREY,
}

WIDTH_INCHES = 8.0
_DPI = {".png": 200, ".svg": 100}


def plain_text[**Arguments, Result](
    draw: Callable[Arguments, Result],
) -> Callable[Arguments, Result]:
    """A drawing function whose texts are shown as they are: names that users give are no formulas,
    and one with a letter that the font lacks says nothing on the terminal."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            return draw(*args, **kwargs)

    return drawn


def new_figure(height_inches: float) -> Figure:
    """An empty figure on white, 800 px wide at 100 dpi, with a canvas that can measure text."""
    figure = Figure((WIDTH_INCHES, height_inches), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def add_axes(
    figure: Figure, *, left: float, bottom: float = 0.62, right: float = 0.2, top: float = 0.75
) -> Axes:
    """Axes with margins in inches: text is placed by measuring it, so nothing may move later."""
    width, height = figure.get_size_inches()
    box = (left / width, bottom / height)
    axes = figure.add_axes(
        (*box, 1 - (left + right) / width, 1 - (bottom + top) / height), facecolor="none"
    )
    quiet_axes(axes)
    return axes


def stream_name(stream: str) -> str:
    """`MoE stream`: a stream of a program, as people write it."""
    return f"{'MoE' if stream == 'moe' else stream} stream"


def widest_inches(figure: Figure, labels: Sequence[str], size: float) -> float:
    """Width of the widest of some labels, to leave a margin for them."""
    widths = []
    for label in labels:
        text = figure.text(0, 0, label, size=size)
        widths.append(text.get_window_extent().width / figure.dpi)
        text.remove()
    return max(widths, default=0.0)


def set_title(figure: Figure, finding: str, how_to_read: str = "") -> None:
    """The finding in bold, left-aligned; under it, one faint line on how to read the figure.

    A finding too long for the width is set smaller.
    """
    height = figure.get_figheight()
    left = 0.12 / WIDTH_INCHES
    title = figure.text(left, 1 - 0.12 / height, finding, va="top", weight="bold", color=INK)
    title.set_fontsize(12)
    width = title.get_window_extent().width / figure.dpi
    title.set_fontsize(12 * min(1.0, (WIDTH_INCHES - 0.24) / width))
    figure.text(left, 1 - 0.40 / height, how_to_read, va="top", size=9, color=FAINT)


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure; the same figure gives the same bytes."""
    path = checked_path(path)
    suffix = path.suffix.lower()
    stamp = {"Date": None} if suffix == ".svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "cmjax"}), replaced(path) as file:  # else ids are random
        figure.savefig(file, format=suffix[1:], dpi=_DPI[suffix], metadata=stamp)


def quiet_axes(axes: Axes, *, keep: Sequence[str] = ("left", "bottom")) -> None:
    """Leave only the spines that carry a scale; numbers and ticks in a soft grey."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color("#BBBBBB")
    axes.tick_params(colors=FAINT, labelsize=9, length=3)
    axes.xaxis.label.set(color=INK, size=10)
    axes.yaxis.label.set(color=INK, size=10)


def draw_limit(axes: Axes, at: float, label: str) -> None:
    """A dashed line at a limit on the horizontal axis, its label over the frame."""
    axes.axvline(at, color=VERMILION, lw=1.3, ls="--", zorder=1)
    axes.annotate(
        label, (at, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", ha="center", size=9, color="#A84600",
    )  # fmt: skip


def text_colour(background: str) -> str:
    """Black or white, whichever reads better on a colour given as `#rrggbb`."""
    red, green, blue = (int(background[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.53 else "white"


def text_fits(axes: Axes, text: Text, width: float, height: float) -> bool:
    """Whether a drawn text stays inside `width` by `height`, in the axes' data units."""
    extent = text.get_window_extent()
    (x0, y0), (x1, y1) = axes.transData.transform([(0, 0), (width, height)])
    return extent.width + 4 <= abs(x1 - x0) and extent.height + 2 <= abs(y1 - y0)


def first_label_that_fits(
    axes: Axes, x: float, y: float, width: float, height: float, labels: Sequence[str], **style
) -> str | None:
    """Write the first of `labels` that fits into a box centred at (x, y); say which, if any.

    Set the axes' limits before: text is measured against them.
    """
    for label in labels:
        text = axes.text(x, y, label, ha="center", va="center", **style)
        if text_fits(axes, text, width, height):
            return label
        text.remove()
    return None
