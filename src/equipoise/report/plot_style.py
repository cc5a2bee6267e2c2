"""Matplotlib style of the reports, and SVG export with colors as CSS variables."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter

from .results_view import BinnedCounts

INK = "#1d2126"
MUTED = "#5c636b"
GRID = "#dcdfe3"
NOISE = "#b3261e"
ACCENT = "#00705a"
MODALITY = ("#0b62a4", "#9c5b00", "#7a3e9d", "#5d6b00", "#a03568", "#00697a")

THEME = {
    INK: ("--fig-ink", "#e8e6e1"),
    MUTED: ("--fig-muted", "#a7adb5"),
    GRID: ("--fig-grid", "#3a3f46"),
    NOISE: ("--fig-noise", "#ff8a7d"),
    ACCENT: ("--fig-accent", "#4fcfae"),
    **{
        light: (f"--fig-{i}", dark)
        for i, (light, dark) in enumerate(
            zip(MODALITY, ("#74b8f2", "#eeb05a", "#c79be8", "#c3cf5c", "#f09ac0", "#5fcbdc"), strict=True)
        )
    },
}
"""Color in the light theme -> (CSS variable, color in the dark theme); all have a contrast of at least 4.5 : 1."""

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names come from the user and may contain a $
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "axes.titlecolor": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
}

FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"


@contextmanager
def style_context() -> Iterator[None]:
    """Applies the report style; restores the settings of the user on exit."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Matplotlib's font lacks some glyphs, but those of the page have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def new_axes(width: float = 4.4, height: float = 3.0, *, grid: str = "y") -> tuple[Figure, Axes]:
    """A figure with one axes object; sizes in inches, ``grid`` is the axis with grid lines."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    only_grid(axes, grid)
    return figure, axes


def only_grid(axes: Axes, grid: str) -> None:
    axes.grid(False)
    if grid:
        axes.grid(True, axis="x" if grid == "x" else "y")
    axes.margins(x=0.03)


def set_title(figure: Figure, text: str) -> None:
    """Sets the title at the left edge, aligned with the caption."""
    figure.suptitle(text, x=0.012, ha="left", fontsize=10.5, color=INK)


class FractionTicks(Formatter):
    """Formats fractions in percentage points, with as many decimals as the spacing of the ticks requires.

    Args:
        text: (percentage points, decimals) -> label.
        decimals: minimum number of decimals.
    """

    def __init__(self, text: Callable[[float, int], str], decimals: int = 0) -> None:
        self._text, self._decimals = text, decimals

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self._text(100 * x, self._decimals)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        spacing = 100 * min(np.diff(values), default=1)
        needed = math.ceil(-math.log10(spacing) - 1e-6) if spacing > 0 else 0
        return [self._text(100 * value, max(self._decimals, needed)) for value in values]


def percent(axis, *, decimals: int = 0) -> None:
    """Formats the fractions of an axis in percent."""
    axis.set_major_formatter(
        FractionTicks(lambda value, digits: f"{value:.{digits}f} %".replace("-", "\N{MINUS SIGN}"), decimals)
    )


def shorten(name: str, length: int = 26) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def jitter(n: int) -> np.ndarray:
    return np.linspace(-0.17, 0.17, n) if n > 1 else np.zeros(n)


def name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_ylim(len(names) - 0.45, -0.55)


def plot_filled(axes: Axes, part: BinnedCounts, shade: str, name: str) -> None:
    axes.stairs(part.fraction, part.edges, fill=True, color=shade, alpha=0.3, linewidth=0)
    axes.stairs(part.fraction, part.edges, color=shade, linewidth=1.2, label=name)


def plot_outline(axes: Axes, part: BinnedCounts, shade: str, name: str) -> None:
    used = np.flatnonzero(part.fraction)
    occupied = slice(used[0], used[-1] + 1)
    edges = part.edges[used[0] : used[-1] + 2]
    axes.stairs(part.fraction[occupied], edges, color=shade, linewidth=1.7, linestyle=(0, (4, 1.5)), label=name)


def add_legend(axes: Axes) -> None:
    """Adds a legend above the histograms."""
    axes.set_ylim(0, 1.24 * axes.dataLim.y1)
    axes.legend(
        frameon=False, fontsize=9, loc="upper right", borderaxespad=0, ncols=3, handlelength=1.3, columnspacing=1.1
    )


def plot_span(parts: list[BinnedCounts | None]) -> tuple[float, float]:
    """The range of the bins with samples, with a margin."""
    ends = []
    for part in parts:
        if part is not None:
            used = np.flatnonzero(part.fraction)
            ends += [part.edges[used[0]], part.edges[used[-1] + 1]]
    return min(ends) - 0.05, max(ends) + 0.05


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Renders a figure as an SVG element for a page.

    The output is deterministic: it has no date, and its identifiers are derived from ``name``, so they do not collide
    with those of other figures. Colors are CSS variables with the light color as fallback; text is kept as text.

    Args:
        figure: created inside ``style_context()``.
        name: unique in the page; letters and hyphens.
        label: text for screen readers.
    """
    sheet = io.StringIO()
    figure.dpi = 72
    with matplotlib.rc_context({"svg.hashsalt": name}):
        # savefig would render the figure twice to compute its bounding box.
        FigureCanvasSVG(figure).print_svg(sheet, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = sheet.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    # A style sheet inside an inline SVG applies to the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"<[^>]*>", lambda tag: _tag(tag.group(), name), svg)
    # Remove the size of the root element: the page scales the SVG by its viewBox.
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head)
    head += f' role="img" aria-label="{escape(label)}" class="figure" stroke-linejoin="round"'
    return f"{head}>{body}"


def _tag(tag: str, name: str) -> str:
    """Replaces identifiers, fonts and colors inside a tag; the text between tags comes from the user and is kept."""
    tag = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag).replace("'DejaVu Sans'", FONT)
    for light, (variable, _) in THEME.items():
        tag = tag.replace(light, f"var({variable},{light})")
    return tag


def to_png(figure: Figure, *, dpi: int = 200) -> bytes:
    """Renders a figure as PNG on a white background."""
    FigureCanvasAgg(figure)
    sheet = io.BytesIO()
    figure.savefig(sheet, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return sheet.getvalue()
