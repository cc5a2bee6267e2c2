"""Renders several searches as one image for the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import NamedTuple

from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import Tensor

from .plot_style import ACCENT, INK, MUTED, style_context, to_png
from .search_html import cosine


class SheetRow(NamedTuple):
    """A query and its results.

    Attributes:
        question: text of the query.
        found: (name, cosine, image, whether it was in the training data), nearest first.
    """

    question: str
    found: Sequence[tuple[str, float, UInt8[Tensor, "height width 3"], bool]]


def contact_sheet(rows: Sequence[SheetRow]) -> bytes:
    """Renders a PNG with one row for each query; names of entries outside the training data are colored."""
    columns = max(len(row.found) for row in rows)
    with style_context():
        figure = Figure(figsize=(1.9 + 1.15 * columns, 1.45 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=[1.6, *[1] * columns])
        for line, row in zip(grid, rows, strict=True):
            for axes in line:
                axes.set_axis_off()
            line[0].text(0, 0.5, fill(f"“{row.question}”", 16), fontsize=11, color=INK, va="center")
            line[0].set(xlim=(0, 1), ylim=(0, 1))
            for axes, (name, value, picture, in_training) in zip(line[1:], row.found, strict=False):
                axes.imshow(picture.numpy(), interpolation="lanczos")
                axes.set_title(
                    f"{fill(name, 17)}\n{cosine(value)}",
                    fontsize=6.5,
                    color=MUTED if in_training else ACCENT,
                    loc="center",
                    y=-0.02,
                    va="top",
                    pad=0,
                )
        return to_png(figure, dpi=150)
