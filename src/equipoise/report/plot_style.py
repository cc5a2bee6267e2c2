"""Matplotlib as a quiet printer: blank axes in one style, and SVG whose colors the page decides."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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
"""Color on white -> (CSS variable, color on a dark page): all of them stand 4.5 to 1 against their ground."""

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are the user's, and may hold a $
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
    """Our style while artists are made and drawn; the user's own settings come back afterward."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The page's fonts have the glyphs that the measuring font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def new_axes(width: float = 4.4, height: float = 3.0, *, grid: str = "y") -> tuple[Figure, Axes]:
    """A figure with one pair of axes; sizes in inches, ``grid`` the axis that has lines."""
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
    """The title, at the left edge of the picture, where the text below it begins too."""
    figure.suptitle(text, x=0.012, ha="left", fontsize=10.5, color=INK)


def percent(axis, *, decimals: int = 0) -> None:
    """Fractions on this axis are printed as per cent."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.{decimals}f} %".replace("-", "\N{MINUS SIGN}"))


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
    here = slice(used[0], used[-1] + 1)
    edges = part.edges[used[0] : used[-1] + 2]
    axes.stairs(part.fraction[here], edges, color=shade, linewidth=1.7, linestyle=(0, (4, 1.5)), label=name)


def add_legend(axes: Axes) -> None:
    """In a free strip above the histograms."""
    axes.set_ylim(0, 1.24 * axes.dataLim.y1)
    axes.legend(
        frameon=False, fontsize=9, loc="upper right", borderaxespad=0, ncols=3, handlelength=1.3, columnspacing=1.1
    )


def plot_span(parts: list[BinnedCounts | None]) -> tuple[float, float]:
    """The stretch of the axis where there are samples, with a little air."""
    ends = []
    for part in parts:
        if part is not None:
            used = np.flatnonzero(part.fraction)
            ends += [part.edges[used[0]], part.edges[used[-1] + 1]]
    return min(ends) - 0.05, max(ends) + 0.05


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element to put into a page.

    The same figure gives the same text: no date, identifiers from ``name``, which also keeps them apart from those of
    other figures in the page. Colors are CSS variables with the light color as fallback; text stays text.

    Args:
        figure: drawn inside ``themed()``.
        name: unique in the page, letters and hyphens.
        label: what a screen reader says.
    """
    sheet = io.StringIO()
    figure.dpi = 72
    with matplotlib.rc_context({"svg.hashsalt": name}):
        # Not savefig, which would draw everything once more to learn its size.
        FigureCanvasSVG(figure).print_svg(sheet, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = sheet.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    # The whole page would obey a style sheet inside one picture.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"<[^>]*>", lambda tag: _tag(tag.group(), name), svg)
    # Only the head's own size: the page scales the picture by its viewBox.
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head)
    head += f' role="img" aria-label="{escape(label)}" class="figure" stroke-linejoin="round"'
    return f"{head}>{body}"


def _tag(tag: str, name: str) -> str:
    """One tag with its own identifiers, the page's font and the page's colors; text between tags is the user's."""
    tag = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag).replace("'DejaVu Sans'", FONT)
    for light, (variable, _) in THEME.items():
        tag = tag.replace(light, f"var({variable},{light})")
    return tag


def to_png(figure: Figure, *, dpi: int = 200) -> bytes:
    """The figure on white, for places that take no SVG."""
    FigureCanvasAgg(figure)
    sheet = io.BytesIO()
    figure.savefig(sheet, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return sheet.getvalue()
