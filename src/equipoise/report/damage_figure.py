"""Figure of a comparison: scores with one modality damaged, against the best modality that is intact."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, stdev

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .plot_style import (
    ACCENT,
    INK,
    MUTED,
    jitter,
    name_rows,
    only_grid,
    percent,
    shorten,
    style_context,
    to_png,
    to_svg,
)
from .results_view import ResultsView
from .text_format import as_read, format_value, gain, is_error, is_fraction, metric_label

LEVEL = 0.95


def confidence_interval(values: list[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of normal values; None for fewer than two.

    Example:
        >>> [round(end, 2) for end in confidence_interval([1.0, 2.0, 3.0])]
        [-0.48, 4.48]
    """
    if len(values) < 2:
        return None
    from scipy import stats

    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def best_intact(readings: ResultsView, damaged: str) -> tuple[str, list[float]] | None:
    """Best other modality alone, with its scores, which the damage does not change; None if none was trained alone."""
    alone = {name: readings.values(name, readings.score) for name in readings.single if name != damaged}
    alone = {name: values for name, values in alone.items() if values}
    if not alone:
        return None
    best = max(alone, key=lambda name: gain(readings.score, fmean(alone[name])))
    return best, alone[best]


def _panels(readings: ResultsView) -> Iterator[tuple[str, str, str]]:
    """(metric, modality, title) of each damage with a best intact modality."""
    tested = [str(name) for part in ("test_corruptions", "left_out") for name in readings.protocol.get(part) or ()]
    damage = ", ".join(dict.fromkeys(tested)) or "other damage"
    for condition, words in (("noise", "replaced by noise"), ("corrupted", f"damaged: {shorten(damage, 34)}")):
        for name in readings.modalities:
            metric = f"{readings.score}_{condition}/{name}"
            if best_intact(readings, name) and any(metric == known for _, known in readings.rows):
                yield metric, name, f"{name} {words}"


def damage_metrics(readings: ResultsView) -> list[str]:
    """Metrics that ``damage`` can draw, one for each damage of each modality."""
    return [metric for metric, _, _ in _panels(readings) if _fusions(readings, metric)]


def damage(readings: ResultsView, only: str | None = None) -> str | None:
    """Scores of the fusions with each modality damaged: means, 95 % intervals, and the best intact modality.

    ``only`` is the metric of a single panel, which has the horizontal axis of all panels.
    """
    with style_context():
        figure = _draw(readings, only)
        # Numbered, since the user chooses the names of modalities.
        name = "damage" if only is None else f"damage-{damage_metrics(readings).index(only)}"
        return None if figure is None else to_svg(figure, name, damage_text(readings, only))


def damage_png(readings: ResultsView) -> bytes | None:
    """The same as a PNG."""
    with style_context():
        figure = _draw(readings)
        return None if figure is None else to_png(figure)


def damage_text(readings: ResultsView, only: str | None = None) -> str:
    """Caption: the fusions that reach the best intact modality under each damage, and the best one."""
    parts = []
    for metric, name, title in _panels(readings):
        intact = best_intact(readings, name)
        means = {method: fmean(readings.values(method, metric)) for method in _fusions(readings, metric)}
        if intact is None or not means or only not in (None, metric):
            continue
        other, values = intact
        best = max(means, key=lambda method: gain(metric, means[method]))
        parts.append(
            f"{title}: the best fusion is {best} with {format_value(metric, means[best])}; {other} alone has "
            f"{format_value(metric, fmean(values))}"
        )
    return ". ".join(parts) + "."


def _fusions(readings: ResultsView, metric: str) -> list[str]:
    return [name for name in readings.methods if name not in readings.single and readings.values(name, metric)]


def _draw(readings: ResultsView, only: str | None = None) -> Figure | None:
    every_panel = [panel for panel in _panels(readings) if _fusions(readings, panel[0])]
    panels = [panel for panel in every_panel if only in (None, panel[0])]
    if not panels:
        return None
    columns = max(2, len({name for _, name, _ in panels})) if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    count = max(len(_fusions(readings, metric)) for metric, _, _ in panels)
    size = (1.7 + 3.1 * columns, 0.4 + rows * (0.75 + 0.3 * count))
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in every.flat[len(panels) :]:
        axes.set_axis_off()
    for number, (axes, (metric, name, title)) in enumerate(zip(every.flat, panels, strict=False)):
        _panel(axes, readings, metric, name, named=number % columns == 0)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        axes.set_xlim(*_limits(readings, every_panel))
    return figure


def _limits(readings: ResultsView, panels: list[tuple[str, str, str]]) -> tuple[float, float]:
    """Common limits of the horizontal axis: all scores and intervals, with a margin; fractions from 0 to 1 at most."""
    ends: list[float] = []
    for metric, name, _ in panels:
        samples = [readings.values(method, metric) for method in _fusions(readings, metric)]
        if (intact := best_intact(readings, name)) is not None:
            samples.append(intact[1])
        for values in samples:
            ends += [as_read(metric, end) for end in (*values, *(confidence_interval(values) or ()))]
    low, high = min(ends), max(ends)
    if is_fraction(readings.score):
        # Intervals of few runs may be wider than the range of a fraction.
        low, high = max(low, 0.0), min(high, 1.0)
    margin = 0.04 * (high - low) or 1e-3
    return low - margin, high + margin


def _panel(axes: Axes, readings: ResultsView, metric: str, name: str, *, named: bool) -> None:
    only_grid(axes, "x")
    methods = _fusions(readings, metric)
    intact = best_intact(readings, name)
    if intact is not None:
        _, values = intact
        line = as_read(metric, fmean(values))
        axes.axvline(line, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        if (interval := confidence_interval(values)) is not None:
            axes.axvspan(*sorted(as_read(metric, end) for end in interval), color=MUTED, alpha=0.15, linewidth=0)
    for index, method in enumerate(methods):
        values, shade = [as_read(metric, v) for v in readings.values(method, metric)], ACCENT if "+" in method else INK
        axes.scatter(values, index + jitter(len(values)), s=11, color=shade, alpha=0.35, linewidths=0)
        if (interval := confidence_interval(values)) is not None:
            axes.plot(interval, [index, index], color=shade, linewidth=1.8)
        axes.plot(np.mean(values), index, "|", color=shade, markersize=12, markeredgewidth=2.6)
    name_rows(axes, [shorten(method, 34) if named else "" for method in methods])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    if is_fraction(metric):
        percent(axes.xaxis)
    label = metric_label(readings.score) + (" (lower is better)" if is_error(metric) else "")
    axes.set_xlabel(label if intact is None else f"{label} · dashed: {shorten(intact[0], 20)} alone", fontsize=8)
