"""Figures of the comparison report as SVG elements; each function returns None if the runs have no data for it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from .plot_style import (
    ACCENT,
    INK,
    MODALITY,
    MUTED,
    NOISE,
    FractionTicks,
    add_legend,
    jitter,
    name_rows,
    new_axes,
    only_grid,
    percent,
    plot_filled,
    plot_outline,
    plot_span,
    set_title,
    shorten,
    style_context,
    to_png,
    to_svg,
)
from .results_view import BinnedCounts, MetricCurve, ResultsView
from .text_format import as_read, format_delta, format_signed, format_value, gain, is_error, is_fraction, method_title


def scores(readings: ResultsView, metric: str = "") -> str | None:
    """Scores of all methods: a dot for each run, a bar for the mean, a line for one standard deviation.

    A dashed line marks the best unimodal baseline.
    """
    metric = metric or readings.score
    methods = [method for method in readings.methods if readings.values(method, metric)]
    if not methods:
        return None
    with style_context():
        figure, axes = new_axes(height=1.15 + 0.36 * len(methods), grid="x")
        _dots(axes, readings, methods, metric)
        set_title(figure, method_title(metric))
        means = [f"{method} {format_value(metric, fmean(readings.values(method, metric)))}" for method in methods]
        return to_svg(
            figure, _name("scores", metric), f"Dot plot of {method_title(metric)}. Means: {', '.join(means)}."
        )


def attention_share(readings: ResultsView, method: str) -> str | None:
    """Attention share of each modality over the epochs: mean over runs, and a band from the lowest to the highest."""
    curves = {name: readings.curve(method, "share", name) for name in readings.modalities}
    curves = {name: curve for name, curve in curves.items() if curve is not None}
    if not curves:
        return None
    with style_context():
        figure, axes = new_axes()
        for name, curve in curves.items():
            _line(axes, curve, color(readings, name))
        _rotations(axes, readings, method)
        axes.set(ylim=(0, 1), xlabel="epoch")
        set_title(figure, shorten(method))
        percent(axes.yaxis)
        _ends(axes, readings, curves)
        ends = ", ".join(f"{name} {100 * curve.mean[-1]:.0f} %" for name, curve in curves.items())
        return to_svg(
            figure, _name("share", readings, method), f"Attention share of {method} over training, at the end: {ends}."
        )


def share_on_noise(readings: ResultsView, method: str) -> str | None:
    """Histogram over test samples of the attention to the other modalities, clean and with one replaced by noise."""
    clean, noise = (readings.histogram(method, "shares", state) for state in ("clean", "noise"))
    if clean is None or noise is None:
        return None
    with style_context():
        figure, axes = new_axes(height=2.6)
        _clean_and_noise(axes, clean, noise)
        set_title(figure, _with_r(readings, method))
        axes.set_xlabel(f"attention not on {readings.disturbed(method) or 'the modality'}")
        means = f"{100 * clean.mean:.0f} % clean, {100 * noise.mean:.0f} % noise"
        label = f"Histograms for {method}: mean attention to the other modalities {means}."
        return to_svg(figure, _name("noise", readings, method), label)


def key_cosines(readings: ResultsView, method: str, moment: str) -> str | None:
    """Histogram over test samples of the cosine of the query and the mean key of each modality; noise as an outline.

    Args:
        moment: "before" or "after" the first rotation; "after" is the end of training.
    """
    clean = {name: readings.histogram(method, "keys", moment, "clean", name, "cosine") for name in readings.modalities}
    clean = {name: part for name, part in clean.items() if part is not None}
    if not clean:
        return None
    disturbed = readings.replaced(method, moment)
    noise = readings.histogram(method, "keys", moment, "noise", disturbed or "", "cosine")
    with style_context():
        figure, axes = new_axes(height=2.6)
        for name, part in clean.items():
            plot_filled(axes, part, color(readings, name), name)
        if noise is not None:
            plot_outline(axes, noise, NOISE, f"{disturbed} replaced by noise")
        when = f", {moment} rotation" if len(readings.moments(method)) > 1 else ""
        axes.set(
            xlabel="cosine of query and mean key",
            yticks=[],
            xlim=plot_span([*clean.values(), noise]),
        )
        add_legend(axes)
        set_title(figure, shorten(method) + when)
        means = ", ".join(f"{name} {format_signed(part.mean)}" for name, part in clean.items())
        return to_svg(figure, _name("keys-" + moment, readings, method), f"Cosines of {method}{when}. Means: {means}.")


def imbalance(readings: ResultsView) -> str | None:
    """Attention imbalance rate (AIR) of every attention-based method over the epochs; rotations as vertical lines."""
    curves = {method: readings.curve(method, "air") for method in readings.dynamic}
    curves = {method: curve for method, curve in curves.items() if curve is not None}
    if not curves:
        return None
    with style_context():
        figure, axes = new_axes()
        axes.axhline(0, color=MUTED, linewidth=0.8)
        for index, (method, curve) in enumerate(curves.items()):
            _line(axes, curve, color(readings, method), ("-", "--", ":", "-.")[index % 4])
            _rotations(axes, readings, method)
        axes.set(xlabel="epoch")
        set_title(figure, "AIR")
        _ends(axes, readings, curves)
        ends = ", ".join(f"{method} {format_signed(curve.mean[-1])}" for method, curve in curves.items())
        return to_svg(figure, "imbalance", f"AIR over training, at the end: {ends}.")


def rotations(readings: ResultsView) -> str | None:
    """Cumulative number of rotations of the query over the epochs."""
    curves = {method: readings.curve(method, "rotations") for method in readings.dynamic}
    curves = {method: curve for method, curve in curves.items() if curve is not None and np.nanmax(curve.values) > 0}
    if not curves:
        return None
    with style_context():
        figure, axes = new_axes()
        for method, curve in curves.items():
            _line(axes, curve, color(readings, method), drawstyle="steps-post")
        axes.set(xlabel="epoch")
        set_title(figure, "Cumulative rotations")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylim(bottom=0)
        _ends(axes, readings, curves)
        ends = ", ".join(f"{method} {curve.mean[-1]:.1f}" for method, curve in curves.items())
        return to_svg(figure, "rotations", f"Rotations per run at the end of training: {ends}.")


def paired_differences(readings: ResultsView, metric: str = "") -> str | None:
    """Differences of each method to its reference on the same seeds: dots, mean, and its 95 % interval."""
    metric = metric or readings.score
    rows = [row for m in readings.methods if (row := readings.row(m, metric)) and row["difference"] is not None]
    if not rows:
        return None
    with style_context():
        figure, axes = new_axes(height=1.15 + 0.36 * len(rows), grid="x")
        axes.axvline(0, color=MUTED, linewidth=1)
        for index, row in enumerate(rows):
            shade = color(readings, row["method"])
            single = [as_read(metric, d) for d in readings.differences(row["method"], row.get("reference"), metric)]
            axes.scatter(single, index + jitter(len(single)), s=13, color=shade, alpha=0.45, linewidths=0)
            if row.get("low") is not None:
                axes.plot(
                    [as_read(metric, row["low"]), as_read(metric, row["high"])],
                    [index, index],
                    color=shade,
                    linewidth=1.6,
                )
            axes.plot(as_read(metric, row["difference"]), index, "|", color=shade, markersize=13, markeredgewidth=2.6)
        name_rows(axes, [f"{shorten(r['method'], 18)} − {shorten(str(r.get('reference')), 14)}" for r in rows])
        set_title(figure, f"{method_title(metric)}, difference")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        if is_fraction(metric):
            axes.xaxis.set_major_formatter(
                FractionTicks(lambda value, digits: format_signed(value, digits) if value else "0")
            )
            axes.set_xlabel("points")
        elif is_error(metric):
            axes.set_xlabel("negative values are better")
        means = ", ".join(f"{row['method']} {format_delta(metric, row['difference'])}" for row in rows)
        return to_svg(figure, _name("difference", metric), f"Paired differences of {method_title(metric)}: {means}.")


def summary_png(readings: ResultsView) -> bytes | None:
    """Summary figure as a PNG: response of attention to noise in one modality, and the scores under that noise."""
    with style_context():
        figure = _summary(readings)
        return None if figure is None else to_png(figure)


def _summary(readings: ResultsView) -> Figure | None:
    shown = [m for m in readings.dynamic if readings.histogram(m, "shares", "noise") is not None][:2]
    metric = f"{readings.score}_noise/{readings.noise_modality}"
    scored = [method for method in readings.methods if readings.values(method, metric)]
    if not shown or not scored:
        return None
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = cast(list[SubFigure], figure.subfigures(1, 2, width_ratios=(1.08, 1), wspace=0.04))
    panels = np.atleast_1d(left.subplots(len(shown), 1, sharex=True))
    for axes, method in zip(panels, shown, strict=True):
        only_grid(axes, "y")
        clean, noise = (readings.histogram(method, "shares", state) for state in ("clean", "noise"))
        if clean is not None and noise is not None:
            _clean_and_noise(axes, clean, noise)
        axes.set_title(_with_r(readings, method))
    panels[-1].set_xlabel(f"attention not on {readings.noise_modality}")
    axes = right.subplots()
    only_grid(axes, "x")
    _dots(axes, readings, scored, metric)
    axes.set_title(method_title(metric))
    return figure


def color(readings: ResultsView, name: str) -> str:
    """The color of a modality or a method, the same in all figures."""
    if name in readings.modalities:
        return MODALITY[readings.modalities.index(name) % len(MODALITY)]
    return ACCENT if "+" in name else INK


def _name(kind: str, *parts: ResultsView | str) -> str:
    """An identifier that is safe in HTML: methods are numbered, since the user chooses their names."""
    if len(parts) == 2 and isinstance(parts[0], ResultsView):
        return f"{kind}-{parts[0].methods.index(str(parts[1]))}"
    return f"{kind}-{''.join(c if c.isalnum() and c.isascii() else '-' for c in str(parts[0]))}"


def _dots(axes: Axes, readings: ResultsView, methods: list[str], metric: str) -> None:
    for index, method in enumerate(methods):
        values, shade = [as_read(metric, v) for v in readings.values(method, metric)], color(readings, method)
        mean = fmean(values)
        axes.scatter(values, index + jitter(len(values)), s=15, color=shade, alpha=0.45, linewidths=0)
        if len(values) > 1:
            spread = np.std(values, ddof=1)
            axes.plot([mean - spread, mean + spread], [index, index], color=shade, linewidth=1.2)
        axes.plot(mean, index, "|", color=shade, markersize=14, markeredgewidth=2.8)
    if best := [fmean(v) for m in readings.single if (v := readings.values(m, metric))]:
        axes.axvline(
            as_read(metric, max(best, key=lambda value: gain(metric, value))),
            color=MUTED,
            linewidth=1,
            linestyle=(0, (4, 3)),
        )
    name_rows(axes, [shorten(method) for method in methods])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    if is_fraction(metric):
        percent(axes.xaxis)
    elif is_error(metric):
        axes.set_xlabel("lower is better")


def _line(axes: Axes, curve: MetricCurve, shade: str, linestyle: str = "-", drawstyle: str = "default") -> None:
    axes.plot(curve.epochs, curve.mean, color=shade, linestyle=linestyle, drawstyle=drawstyle)
    if len(curve.values) > 1:
        low, high = np.nanmin(curve.values, axis=0), np.nanmax(curve.values, axis=0)
        step = "post" if drawstyle != "default" else None
        axes.fill_between(curve.epochs, low, high, color=shade, alpha=0.15, linewidth=0, step=step)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _ends(axes: Axes, readings: ResultsView, curves: Mapping[str, MetricCurve]) -> None:
    """Labels each curve at its end, and moves overlapping labels apart."""
    low, high = axes.get_ylim()
    gap, last = 0.075 * (high - low), -np.inf
    for name, curve in sorted(curves.items(), key=lambda item: item[1].mean[-1]):
        last = max(curve.mean[-1], last + gap)
        offset = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(shorten(name, 18), (curve.epochs[-1], last), color=color(readings, name), **offset)


def _rotations(axes: Axes, readings: ResultsView, method: str) -> None:
    for epoch, count in readings.rotation_epochs(method).items():
        part = count / len(readings.of(method))
        axes.axvline(epoch, color=ACCENT, linewidth=1.1, linestyle=(0, (1, 2)), alpha=0.3 + 0.7 * part)


def _clean_and_noise(axes: Axes, clean: BinnedCounts, noise: BinnedCounts) -> None:
    plot_filled(axes, clean, MUTED, "clean")
    plot_outline(axes, noise, NOISE, "noise")
    axes.set(xlim=(0, 1), yticks=[])
    percent(axes.xaxis)
    add_legend(axes)


def _with_r(readings: ResultsView, method: str) -> str:
    r = readings.row(method, "noise_attention_r")
    return shorten(method) + ("" if r is None else f" · r = {format_signed(r['mean'])}")
