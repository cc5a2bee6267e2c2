"""Figures of an inspection: attention by layer, modality and head, and the share of a modality over the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .plot_style import ACCENT, INK, MODALITY, MUTED, new_axes, only_grid, percent, set_title, style_context, to_svg

DEEPEST = 0.45
"""Opacity of the largest value, low enough for readable text on top."""


def by_layer(
    shares: dict[str, Float[np.ndarray, "layer modality"]], names: Sequence[str], layers: Sequence[int]
) -> str:
    """Heat map of layer and modality with values, for the prompt and the answer; without columns of zeros."""
    kept = [m for m in range(len(names)) if any(np.nansum(part[:, m]) > 0 for part in shares.values())]
    values = np.concatenate([part[:, kept] for part in shares.values()], axis=1)
    columns = [f"{names[m]}\nin the {view}" for view in shares for m in kept]
    with style_context():
        figure, axes = new_axes(max(3.6, 1.1 * len(columns)), 0.9 + 0.23 * len(layers), grid="")
        shades = [MODALITY[m % len(MODALITY)] for _ in shares for m in kept]
        for column, shade in enumerate(shades):
            _cells(axes, values[:, column : column + 1], shade, 1.0, left=column)
        for (row, column), value in np.ndenumerate(values):
            if not math.isnan(value):
                axes.text(column, row, f"{100 * value:.0f} %", ha="center", va="center", fontsize=8.5, color=INK)
        axes.set_xticks(range(len(columns)), columns, color=INK, fontsize=8.5)
        axes.xaxis.tick_top()
        _rows(axes, layers, every=1)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(layers) - 0.5, -0.5), ylabel="layer")
        return to_svg(figure, "by-layer", _alt_text(shares, names))


def by_head(values: Float[np.ndarray, "layer head"], title: str, name: str, shade: int, layers: Sequence[int]) -> str:
    """Heat map of the attention share of one modality by layer and head."""
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    with style_context():
        figure, axes = new_axes(4.4, max(1.9, min(6.0, 1.0 + 0.17 * len(layers))), grid="")
        _cells(axes, values, MODALITY[shade % len(MODALITY)], top or 1.0)
        _rows(axes, layers, every=max(1, len(layers) // 12))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        heads = values.shape[1]
        axes.set(xlim=(-0.5, heads - 0.5), ylim=(len(layers) - 0.5, -0.5), xlabel="head", ylabel="layer")
        set_title(figure, title)
        row, head = divmod(int(np.nanargmax(values)), heads) if top else (0, 0)
        label = f"{title}, by layer and head: at most {100 * top:.1f} %, in layer {layers[row]}, head {head}."
        return to_svg(figure, name, label)


def over_layers(
    shares: Float[np.ndarray, " layer"], without: Float[np.ndarray, " layer"], uniform: Float[np.ndarray, " layer"],
    title: str, layers: Sequence[int],
) -> str:  # fmt: skip
    """Attention share of one modality over the layers, with and without sinks, and the uniform share."""
    curves = (
        ("all tokens", shares, MODALITY[1], "-"),
        ("without sinks", without, ACCENT, "--"),
        ("uniform share", uniform, MUTED, ":"),
    )
    with style_context():
        figure, axes = new_axes(height=2.9)
        for name, values, shade, dashes in curves:
            marker = "o" if len(layers) < 3 else None
            axes.plot(layers, values, color=shade, linestyle=dashes, label=name, marker=marker, markersize=4)
        top = max([0.02, *(float(np.nanmax(v)) for _, v, _, _ in curves if np.isfinite(v).any())])
        axes.set(xlabel="layer", ylim=(0, 1.28 * top))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        # Keep the ticks below the legend.
        axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1.05 * top])
        percent(axes.yaxis, decimals=0 if top > 0.04 else 1)
        axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=3, handlelength=1.8, columnspacing=1.1)
        set_title(figure, title)
        means = ", ".join(f"{name} {100 * np.nanmean(v):.1f} %" for name, v, _, _ in curves if np.isfinite(v).any())
        return to_svg(figure, "over-layers", f"{title}, over the layers. Means: {means}.")


def written_by_layer(values: Sequence[float], layers: Sequence[int]) -> str:
    """Bars of the norm that cross-attention writes in each layer, relative to all attention."""
    title = "Written by cross-attention"
    with style_context():
        figure, axes = new_axes(height=2.6)
        axes.bar(list(layers), [0.0 if math.isnan(value) else value for value in values], width=0.62, color=MODALITY[1])
        axes.set(xlabel="layer", ylim=(0, 1), xlim=(-0.7, max(len(layers), 4) - 0.3))
        axes.set_xticks(list(layers)[:: max(1, len(layers) // 12)])
        percent(axes.yaxis)
        set_title(figure, title)
        listed = ", ".join(f"layer {layer} {100 * value:.0f} %" for layer, value in zip(layers, values, strict=True))
        return to_svg(figure, "written", f"{title}: {listed}.")


def _cells(axes: Axes, values: Float[np.ndarray, "row column"], shade: str, top: float, left: int = 0) -> None:
    """One rectangle for each value; the opacity increases with the value."""
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            opacity = round(DEEPEST * min(1.0, value / top), 3)
            cell = Rectangle((left + column - 0.5, row - 0.5), 1, 1)
            axes.add_collection(PatchCollection([cell], facecolors=shade, alpha=opacity, linewidths=0))


def _rows(axes: Axes, layers: Sequence[int], every: int) -> None:
    shown = range(0, len(layers), every)
    axes.set_yticks(list(shown), [str(layers[row]) for row in shown])
    only_grid(axes, "")


def _alt_text(shares: dict[str, Float[np.ndarray, "layer modality"]], names: Sequence[str]) -> str:
    parts = [
        f"{name} in the {view} {100 * np.nanmean(values[:, m]):.1f} %"
        for view, values in shares.items() for m, name in enumerate(names)
    ]  # fmt: skip
    return f"Attention by layer and modality. Means over layers: {', '.join(parts)}."
