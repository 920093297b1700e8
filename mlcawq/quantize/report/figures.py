"""Plots as SVG that lies in a page and takes its colours, light, dark or on paper."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib draws in colours that stand for a name, and the SVG then asks the page for the name.
INK, MUTED, GRID = "#010101", "#010102", "#010103"
NEAREST, FOUND = "#010201", "#010202"
SERIES = tuple(f"#0103{i:02x}" for i in range(8))
_NAMES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    NEAREST: "nearest",
    FOUND: "found",
    **{color: f"series-{i}" for i, color in enumerate(SERIES)},
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched and copied, and is small
    "svg.hashsalt": "mlcawq",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_WIDTH = 9.6  # inches; the page scales it to its own width
_PANEL_HEIGHT = 1.75  # with its title and its ticks' labels
_TITLE, _TICKS, _LEGEND = 0.22, 0.24, 0.3
_PANELS_A_ROW = 4


@dataclass(frozen=True)
class Picture:
    """An SVG element, and what it shows, for those who cannot see it."""

    svg: str
    title: str


@dataclass(frozen=True)
class Line:
    """Values by layer. low, high: a band around them. None where a layer has none."""

    values: list[float | None]
    color: str
    label: str = ""
    low: list[float | None] | None = None
    high: list[float | None] | None = None


@contextmanager
def style() -> Iterator[None]:
    """Within it, figures are made in the page's style."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def rows_of_panels(count: int, height: float = _PANEL_HEIGHT) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes, up to four in a row. Called within `style`."""
    columns = min(max(count, 2), _PANELS_A_ROW)
    rows = -(-count // columns)
    figure = _figure(rows * height, left=0.5)
    # matplotlib would find the margins by itself, in most of the time that a page takes.
    gap = _TITLE + _TICKS
    figure.subplots_adjust(wspace=0.55 * columns / _WIDTH, hspace=gap / (height - gap))
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    return figure, axes


def one_panel(height: float, labels: Sequence[str] = ()) -> tuple[Figure, Axes]:
    """A figure with axes as wide as the page, `height` inches high. Called within `style`.

    labels: those of the y axis, for which there is room on the left.
    """
    longest = max((len(label) for label in labels), default=0)
    figure = _figure(height, left=max(0.5, 0.2 + 0.078 * longest))
    return figure, figure.add_subplot()


def _figure(height: float, left: float) -> Figure:
    """Room for panels of `height` inches in all, between legend, margins and the last ticks."""
    from matplotlib.figure import Figure

    whole = height + _LEGEND + 0.2
    figure = Figure(figsize=(_WIDTH, whole))
    figure.subplots_adjust(
        left=left / _WIDTH,
        right=1 - 0.1 / _WIDTH,
        bottom=(_TICKS + 0.2) / whole,
        top=1 - (_LEGEND + _TITLE) / whole,
    )
    return figure


def draw_lines(axes: Axes, lines: list[Line], *, log: bool = False) -> None:
    """Lines over the layers' numbers; markers where there are few layers to connect.

    log: a logarithmic scale, on which nought and less are left out; not where nothing is more.
    """
    layers = max((len(line.values) for line in lines), default=0)
    log = log and any(_drawn(value, True) for line in lines for value in line.values)
    for line in lines:
        known = [(i, value) for i, value in enumerate(line.values) if _drawn(value, log)]
        axes.plot(
            [i for i, _ in known],
            [value for _, value in known],
            color=line.color,
            lw=1.3,
            marker="o" if layers <= 24 else None,
            ms=2.6,
            label=line.label or None,
        )
        bands = [
            (i, low, high)
            for i, (low, high) in enumerate(zip(line.low or [], line.high or [], strict=True))
            if _drawn(low, log) and _drawn(high, log)
        ]
        if bands:
            at, low_edge, high_edge = zip(*bands, strict=True)
            axes.fill_between(at, low_edge, high_edge, color=line.color, alpha=0.2, lw=0)
    if log:
        axes.set_yscale("log")
    layer_axis(axes, layers)


def _drawn(value: float | None, log: bool) -> bool:
    return value is not None and isfinite(value) and (value > 0 or not log)


def layer_axis(axes: Axes, layers: int) -> None:
    """Whole numbers of layers along x."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.5, max(layers - 0.5, 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")


def log_ticks(axes: Axes, words: Callable[[float], str]) -> None:
    """Ticks of a y axis at round numbers, as `words` writes them; few on a logarithmic one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    bottom, top = axes.get_ylim()
    if axes.get_yscale() == "log" and top / bottom > 4:
        subs = (1.0,) if top / bottom > 30 else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
    else:  # powers and their multiples would be one tick, or none
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def share_limits(panels: list[Axes]) -> None:
    """One range of y for all panels, so that they can be compared; numbers on the left ones."""
    limits = [axes.get_ylim() for axes in panels]
    for i, axes in enumerate(panels):
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        axes.tick_params(labelleft=i % _PANELS_A_ROW == 0)


def from_zero(axes: Axes) -> None:
    """The y axis begins at nought and ends above what is drawn."""
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.08 * top if top > 0 else 1)


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, over them."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="upper left", ncols=len(labels), fontsize=9)


def picture(figure: Figure, title: str, name: str) -> Picture:
    """The figure as SVG. name: makes its ids different from those of the page's other figures."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for size in ("width", "height"):  # of the element itself: the page decides
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    for color, variable in _NAMES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return Picture(svg, title)
