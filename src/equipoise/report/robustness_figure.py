"""Figure of a robustness test: the mean score under each corruption, compared with the best intact modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..results.result_rows import finite_or_none
from .plot_style import ACCENT, INK, MODALITY, MUTED, name_rows, only_grid, shorten, style_context


def draw_robustness(rows: Sequence[Mapping[str, Any]], clean: float, names: Sequence[str]) -> Figure:
    """Draws one panel for each damaged modality, with one line for each corruption.

    The dot is the mean score over the severities and the bar their range; the dashed line is the clean score, the solid
    line that of the best intact modality.

    Args:
        rows: modality, corruption, severity, score and best_intact, as ``Robustness.rows`` returns them.
        clean: score without damage.
        names: all modalities, which determine the colors.
    """
    panels = list(dict.fromkeys(row["modality"] for row in rows))
    kinds = list(dict.fromkeys(row["corruption"] for row in rows))
    # Values of a saved diagnosis that were NaN are None.
    scores = [value for row in rows if (value := finite_or_none(row["score"])) is not None]
    intact = [value for row in rows if (value := finite_or_none(row["best_intact"])) is not None]
    low, high = min([*scores, *intact, clean]), max([*scores, *intact, clean])
    margin = 0.05 * ((high - low) or 1.0)
    with style_context():
        figure = Figure(figsize=(2.2 + 2.6 * len(panels), 1.2 + 0.24 * len(kinds)), layout="constrained")
        every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, modality in zip(every, panels, strict=True):
            only_grid(axes, "x")
            curves = [row for row in rows if row["modality"] == modality]
            color = MODALITY[list(names).index(modality) % len(MODALITY)]
            axes.axvline(clean, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            if finite_or_none(curves[0]["best_intact"]) is not None:
                axes.axvline(curves[0]["best_intact"], color=ACCENT, linewidth=1.4)
            for index, kind in enumerate(kinds):
                values = [row["score"] for row in curves if row["corruption"] == kind]
                values = [value for value in values if finite_or_none(value) is not None]
                if values:
                    axes.plot([min(values), max(values)], [index, index], color=color, linewidth=1.4)
                    axes.plot(sum(values) / len(values), index, "o", color=color, markersize=5)
            axes.set_xlim(low - margin, high + margin)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
            axes.set_title(f"damaged: {shorten(modality, 18)}", color=INK)
            axes.set_xlabel("score")
        name_rows(every[0], [kind.replace("_", " ") for kind in kinds])
    return figure
