"""Style of plots, and conversion of a matplotlib figure to SVG inside the page.

Figures are drawn in the colors of a light page. Inside the page those few colors become CSS variables, so
that the same drawing follows the reader's light or dark theme; text stays text, in the page's font.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, GRID, SURFACE = "#5b6570", "#dfe3e8", "#ffffff"
BLUE, ORANGE, GREEN = "#2f74c0", "#d9772b", "#2a9270"
PURPLE, GREY, RED = "#7d63b8", "#8b939c", "#cc4b5a"
VARIABLES: Mapping[str, str] = {
    INK: "ink-soft",
    GRID: "line",
    SURFACE: "surface",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PURPLE: "purple",
    GREY: "grey",
    RED: "red",
}
"""Color in the drawing → CSS variable in the page."""

# Of things side by side: distinct in both themes; more than these colors repeat them with another line style.
_MANY_COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
_MANY_DASHES = ((), (4, 2), (1, 1.5), (6, 1, 1, 1))

WIDTH, HEIGHT = 4.8, 2.7  # inches; at 8.5 points text is readable on a phone and not huge on a desk
_MANY_POINTS = 400
_SMOOTH_FROM = 24
_PNG_DPI = 200
_TICK_STEPS = [1, 2, 2.5, 5, 10]
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of runs and metrics are shown as they are
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.color": GRID,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    "xtick.major.size": 3,
    "legend.frameon": False,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.4,
    "legend.handletextpad": 0.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "axes.formatter.useoffset": False,
}

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plot:
    """A drawn plot. ``inline`` is the SVG for the page, ``svg`` and ``png`` are for files."""

    name: str
    title: str
    caption: str
    healthy: str
    group: str
    inline: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Look:
    """Style of one of many lines. ``dashes`` are lengths in line widths; none for a solid line."""

    color: str
    dashes: tuple[float, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for matplotlib."""
        return {"color": self.color, "linestyle": (0, self.dashes) if self.dashes else "-"}


def look(index: int) -> Look:
    """Look of the line with this number."""
    dashes = _MANY_DASHES[index // len(_MANY_COLORS) % len(_MANY_DASHES)]
    return Look(_MANY_COLORS[index % len(_MANY_COLORS)], dashes)


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Apply the style; ``salt`` makes the ids inside the SVG reproducible and different per plot."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        yield


def new_axes(height: float = HEIGHT) -> tuple[Figure, Any]:
    """A figure with one pair of axes. No pyplot: no global state, no window system."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    return figure, axes


def draw_line(axes: Any, x: Numbers, y: Numbers, *, label: str, color: str, smooth: bool) -> None:
    """One curve: a faint one as recorded with its moving average on top, or few points as they are."""
    known = ~np.isnan(y)
    if known.sum() == 0:
        return
    if known.sum() < _SMOOTH_FROM or not smooth:
        few = known.sum() <= 3 or known.sum() <= min(40, len(y) - 1)
        marker = {"marker": "o", "markersize": 3.5} if few else {}
        axes.plot(x[known], y[known], color=color, label=label, **marker)
        return
    x, y = x[known], y[known]
    average = moving_average(y, max(5, len(y) // 15))
    if len(y) > _MANY_POINTS:
        # Thousands of steps make a page of many megabytes and a black smear: show the range per bin.
        bins = np.array_split(np.arange(len(y)), _MANY_POINTS // 2)
        middle = np.array([x[b].mean() for b in bins])
        axes.fill_between(
            middle,
            np.array([y[b].min() for b in bins]),
            np.array([y[b].max() for b in bins]),
            color=color,
            alpha=0.22,
            linewidth=0,
        )
        axes.plot(middle, np.array([average[b].mean() for b in bins]), color=color, label=label)
    else:
        axes.plot(x, y, color=color, alpha=0.32, linewidth=0.9)
        axes.plot(x, average, color=color, label=label)


def moving_average(values: Numbers, width: int) -> Numbers:
    """Centered mean over up to ``width`` values with bell-shaped weights; fewer values at both ends."""
    half = min(width, len(values) - 1) // 2
    kernel = np.hanning(2 * half + 3)[1:-1]
    weights = np.convolve(np.ones(len(values)), kernel, mode="same")
    averages: Numbers = np.convolve(values, kernel, mode="same") / weights
    return averages


def finish(
    figure: Figure,
    axes: Any,
    *,
    xlabel: str,
    ylabel: str,
    percent: bool,
    from_zero: bool,
    legend: bool = True,
) -> None:
    """Labels, ticks, and a legend if there is more than one line."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel, labelpad=8)  # room for the larger text of narrow pages
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_TICK_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
    bottom, top = limits(axes.dataLim.y0, axes.dataLim.y1, percent=percent, from_zero=from_zero)
    axes.set_ylim(bottom, top)
    # Enough digits that neighboring ticks differ, such as 1.00002 and 1.00004.
    digits = max(4, 2 + math.ceil(math.log10(max(abs(bottom), abs(top)) / (top - bottom))))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.{digits}g} %"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, digits)))
    if legend and len(axes.get_legend_handles_labels()[1]) > 1:
        figure.legend(loc="outside upper left", ncols=4, fontsize=8.5)


def limits(low: float, high: float, *, percent: bool, from_zero: bool) -> tuple[float, float]:
    """Range of the y axis: all of the data with a margin, but nothing beyond the possible values of a share."""
    low = min(low, 0.0) if from_zero else low
    high = max(high, 0.0) if from_zero else high
    if high == low:  # a constant: show it against a scale that says how little it varies
        pad = 0.05 if percent else abs(high) / 10 or 1.0
        low, high = (low if from_zero else low - pad), high + pad
    margin = 0.05 * (high - low)
    bottom, top = low - (0.02 * (high - low) if from_zero and low == 0 else margin), high + margin
    if percent:
        edge = 0.02 * (high - low)  # half a line's width beyond 0 and 100 %
        bottom, top = max(bottom, -edge), min(top, 1 + edge)
    return bottom, top


def short_number(value: float, digits: int = 4) -> str:
    """A number such as ``12 k``, ``0.004``, ``3 M`` or ``5e−5``."""
    size = abs(value)
    if size >= 1e4:
        limit, suffix = next(pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= pair[0])
        text = f"{value / limit:.{digits}g} {suffix}"
    elif 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", "−")


def to_svg(figure: Figure) -> str:
    """The figure as a standalone SVG document, without clock or version."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_files(figure: Figure) -> tuple[str, bytes]:
    """The figure as SVG and as PNG, laid out once, which saves a seventh of the time."""
    svg = to_svg(figure)
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_PNG_DPI, facecolor=SURFACE, metadata={"Software": None})
    return svg, buffer.getvalue()


def inline_svg(svg: str, name: str, label: str) -> str:
    """Turn a standalone SVG into an element of the page.

    Drops what only a document needs (prolog, metadata, namespaces, fixed size), makes ids unique in the
    page, and replaces colors by CSS variables.
    """
    body = svg[svg.index("<svg") :]
    opening_end = body.index(">") + 1
    view_box = re.search(r'viewBox="([^"]+)"', body[:opening_end])
    assert view_box is not None, "matplotlib always writes a viewBox"
    body = re.sub(r"<metadata>.*?</metadata>", "", body[opening_end:], flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    body = re.sub(r"font: ([\d.]+)px '[^']*'(?:, [^;\"]*)?", r"font-size: \1px", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    return f'<svg viewBox="{view_box[1]}" role="img" aria-label="{html.escape(label)}">{body}'
