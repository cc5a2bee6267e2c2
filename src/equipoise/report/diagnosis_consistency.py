"""Figures of the consistency test: block matrix of the attention maps between modalities, and its spectrum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from .diagnosis_subject import ReportColumn
from .html_page import FigureBlock
from .plot_style import ACCENT, GRID, INK, MUTED, new_axes, shorten, style_context

FAINT = 0.02
"""Cells below this fraction of the largest value are not drawn."""
CLEAR = 3
"""Inconsistent cycles are listed if they have at least this multiple of their strength under uniform attention."""
NAMED = 24
"""Maximum number of tokens whose names are drawn."""


def consistency(column: ReportColumn) -> FigureBlock | None:
    """Block matrix of the layer with the largest cycle error, and its most inconsistent cycles."""
    layer = _worst(column)
    if layer is None:
        return None
    matrix, sizes = np.asarray(layer["matrix"], dtype=float), [int(size) for size in layer["sizes"]]
    per_modality = _own(sizes)
    top = float(matrix[~per_modality].max(initial=0.0))
    with style_context():
        figure = Figure(figsize=(4.4, 4.1), layout="constrained")
        axes = figure.add_subplot()
        _cells(axes, np.where(per_modality, 0.0, matrix / top if top else 0.0), ACCENT)
        _cells(axes, np.where(per_modality, matrix, 0.0), GRID)
        _borders(axes, sizes)
        _names(axes, column, sizes, layer["tokens"])
        return column.render(
            figure, "consistency", f"{_where(layer)}. Maximum: {100 * top:.0f} %. {_cycles_text(layer)}"
        )


def spectrum(column: ReportColumn) -> FigureBlock | None:
    """Singular values of that matrix, compared with those of consistent one-to-one maps."""
    layer = _worst(column)
    if layer is None:
        return None
    observed, ideal = layer["spectrum"], layer["ideal"]
    with style_context():
        figure, axes = new_axes(height=2.6)
        positions = np.arange(len(observed))
        axes.bar(positions, observed, width=0.7, color=ACCENT, alpha=0.75, linewidth=0, label="observed")
        edges = np.arange(len(ideal) + 1) - 0.5
        axes.stairs(ideal, edges, color=INK, linewidth=1.3, linestyle=(0, (4, 2)), label="consistent one-to-one maps")
        axes.set(xlabel="singular value, largest first", xticks=[], ylim=(0, 1.05 * max(*observed, *ideal)))
        axes.legend(frameon=False, fontsize=9, loc="upper right")
        shared = min(layer["sizes"])
        part = sum(observed[:shared]) / max(sum(observed), 1e-12)
        return column.render(
            figure, "spectrum",
            f"{_where(layer)}: the first {shared} singular values (one for each concept that all modalities can share) "
            f"are {100 * part:.0f} % of the sum; {100 * sum(ideal[:shared]) / sum(ideal):.0f} % for consistent maps. "
            f"Mean score {layer['score']:.2f}, of uniform attention {layer['even']:.2f}.",
        )  # fmt: skip


def _worst(column: ReportColumn) -> Mapping[str, Any] | None:
    layers = column.details("consistency").get("layers") or []
    return max(layers, key=lambda layer: layer["cycle_error"]) if layers else None


def _where(layer: Mapping[str, Any]) -> str:
    return f"{layer['site']}, mean of {layer['samples']} sample{'' if layer['samples'] == 1 else 's'}"


def _cycles_text(layer: Mapping[str, Any]) -> str:
    """The most inconsistent cycles in a sentence."""
    if not layer["cycles"]:
        return "All cycles are consistent."
    clear = [cycle for cycle in layer["cycles"] if cycle["strength"] >= CLEAR * cycle["even"]]
    paths = [f"{' → '.join(cycle['way'])} ({100 * cycle['strength']:.0f} %)" for cycle in clear]
    if not paths:
        return f"No inconsistent cycle has {CLEAR} times its strength under uniform attention."
    return f"Inconsistent cycles and their strength: {'; '.join(paths)}."


def _own(sizes: Sequence[int]) -> np.ndarray:
    """True inside the diagonal blocks."""
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    return numbers[:, None] == numbers[None, :]


def _cells(axes: Axes, strength: np.ndarray, shade: str) -> None:
    """Draws one square for each cell with an opacity proportional to its value."""
    rows, columns = np.nonzero(strength > FAINT)
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    squares = np.stack([columns, rows], axis=1)[:, None] + corners
    colors = [to_rgba(shade, float(min(strength[row, column], 1.0))) for row, column in zip(rows, columns, strict=True)]
    axes.add_collection(PolyCollection(list(squares), facecolors=colors, linewidths=0))


def _borders(axes: Axes, sizes: Sequence[int]) -> None:
    total = sum(sizes)
    for edge in (0, *accumulate(sizes)):
        axes.plot([edge, edge], [0, total], color=MUTED, linewidth=0.9, clip_on=False)
        axes.plot([0, total], [edge, edge], color=MUTED, linewidth=0.9, clip_on=False)
    axes.set(xlim=(0, total), ylim=(total, 0), aspect="equal")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _names(axes: Axes, column: ReportColumn, sizes: Sequence[int], tokens: Sequence[str]) -> None:
    """Labels modalities at the top and, if there is room, tokens at the left."""
    starts = [0, *accumulate(sizes)]
    middles = [(start + end) / 2 for start, end in pairwise(starts)]
    names = [shorten(name, 14) for name in column.names]
    axes.xaxis.tick_top()
    axes.set_xticks(middles, names)
    has_names = len(tokens) <= NAMED
    ticks = [index + 0.5 for index in range(len(tokens))] if has_names else middles
    axes.set_yticks(ticks, [shorten(token, 22) for token in tokens] if has_names else names)
    axes.tick_params(axis="y", labelsize=7.5 if has_names else 9.5)
    for label, name in zip(axes.get_xticklabels(), column.names, strict=True):
        label.set_color(column.color(name))
    if not has_names:
        for label, name in zip(axes.get_yticklabels(), column.names, strict=True):
            label.set_color(column.color(name))
