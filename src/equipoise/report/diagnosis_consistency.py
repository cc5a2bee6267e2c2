"""Pictures of maps between modalities: the block matrix of all of them, its spectrum, and the ways that go astray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from .diagnosis_subject import DiagnosisFigure, ReportColumn
from .plot_style import ACCENT, GRID, INK, MUTED, new_axes, shorten, style_context

FAINT = 0.02
"""A part of the strongest cell below which a cell is not drawn."""
CLEAR = 3
"""A way round is named where it gets so many times what even attention would give it."""
NAMED = 24
"""Most tokens that get their names at the edge."""


def consistency(of: ReportColumn) -> DiagnosisFigure | None:
    """The block matrix of the layer that contradicts itself most, and its worst ways round."""
    layer = _worst(of)
    if layer is None:
        return None
    matrix, sizes = np.asarray(layer["matrix"], dtype=float), [int(size) for size in layer["sizes"]]
    own = _own(sizes)
    top = float(matrix[~own].max(initial=0.0))
    with style_context():
        figure = Figure(figsize=(4.4, 4.1), layout="constrained")
        axes = figure.add_subplot()
        _cells(axes, np.where(own, 0.0, matrix / top if top else 0.0), ACCENT)
        _cells(axes, np.where(own, matrix, 0.0), GRID)
        _borders(axes, sizes)
        _names(axes, of, sizes, layer["tokens"])
        return of.picture(figure, "consistency", f"{_where(layer)}. Strongest: {100 * top:.0f} %. {_ways(layer)}")


def spectrum(of: ReportColumn) -> DiagnosisFigure | None:
    """The singular values of that matrix, beside those of hard maps that agree."""
    layer = _worst(of)
    if layer is None:
        return None
    found, ideal = layer["spectrum"], layer["ideal"]
    with style_context():
        figure, axes = new_axes(height=2.6)
        places = np.arange(len(found))
        axes.bar(places, found, width=0.7, color=ACCENT, alpha=0.75, linewidth=0, label="found")
        edges = np.arange(len(ideal) + 1) - 0.5
        axes.stairs(ideal, edges, color=INK, linewidth=1.3, linestyle=(0, (4, 2)), label="hard maps that agree")
        axes.set(xlabel="singular value, largest first", xticks=[], ylim=(0, 1.05 * max(*found, *ideal)))
        axes.legend(frameon=False, fontsize=9, loc="upper right")
        shared = min(layer["sizes"])
        part = sum(found[:shared]) / max(sum(found), 1e-12)
        return of.picture(
            figure, "spectrum",
            f"{_where(layer)}: the first {shared}, one for each concept that all could share, hold {100 * part:.0f} % "
            f"of the sum; maps that agree have {100 * sum(ideal[:shared]) / sum(ideal):.0f} % there. Score of the "
            f"samples {layer['score']:.2f}, of even attention {layer['even']:.2f}.",
        )  # fmt: skip


def _worst(of: ReportColumn) -> Mapping[str, Any] | None:
    layers = of.details("consistency").get("layers") or []
    return max(layers, key=lambda layer: layer["cycle_error"]) if layers else None


def _where(layer: Mapping[str, Any]) -> str:
    return f"{layer['site']}, mean of {layer['samples']} sample{'' if layer['samples'] == 1 else 's'}"


def _ways(layer: Mapping[str, Any]) -> str:
    """The worst contradictions in a sentence."""
    if not layer["cycles"]:
        return "Every way round leads back to where it began."
    clear = [cycle for cycle in layer["cycles"] if cycle["strength"] >= CLEAR * cycle["even"]]
    ways = [f"{' → '.join(cycle['way'])} ({100 * cycle['strength']:.0f} %)" for cycle in clear]
    if not ways:
        return f"No way that leads astray gets {CLEAR} times what even attention would give it."
    return f"Ways that do not lead back, and how much attention takes them: {'; '.join(ways)}."


def _own(sizes: Sequence[int]) -> np.ndarray:
    """True inside the blocks of a modality with itself."""
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    return numbers[:, None] == numbers[None, :]


def _cells(axes: Axes, strength: np.ndarray, shade: str) -> None:
    """A square for each cell, the more opaque the stronger, so that the page's ground shows through."""
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


def _names(axes: Axes, of: ReportColumn, sizes: Sequence[int], tokens: Sequence[str]) -> None:
    """Modalities along the top and, where there is room, tokens along the left."""
    starts = [0, *accumulate(sizes)]
    middles = [(start + end) / 2 for start, end in pairwise(starts)]
    names = [shorten(name, 14) for name in of.names]
    axes.xaxis.tick_top()
    axes.set_xticks(middles, names)
    named = len(tokens) <= NAMED
    places = [place + 0.5 for place in range(len(tokens))] if named else middles
    axes.set_yticks(places, [shorten(token, 22) for token in tokens] if named else names)
    axes.tick_params(axis="y", labelsize=7.5 if named else 9.5)
    for label, name in zip(axes.get_xticklabels(), of.names, strict=True):
        label.set_color(of.color(name))
    if not named:
        for label, name in zip(axes.get_yticklabels(), of.names, strict=True):
            label.set_color(of.color(name))
