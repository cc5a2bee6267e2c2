"""Figures of a diagnosis, one function for each; a function returns None if its test has no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..results.result_rows import finite_or_none
from .diagnosis_consistency import consistency, spectrum
from .diagnosis_subject import ReportColumn
from .html_page import FigureBlock
from .plot_style import (
    ACCENT,
    INK,
    MUTED,
    NOISE,
    add_legend,
    name_rows,
    new_axes,
    percent,
    plot_filled,
    plot_outline,
    plot_span,
    shorten,
    style_context,
)
from .results_view import as_histogram
from .robustness_figure import draw_robustness
from .text_format import as_read, format_signed, is_error, method_title, metric_label


def without(column: ReportColumn, test: str, kinds: Mapping[str, str]) -> FigureBlock | None:
    """The unmodified score and the score under each condition, with 95 % intervals."""
    full = column.found.get(column.found.score)
    rows: list[tuple[str, str, str]] = [] if full is None else [("unmodified", column.found.score, INK)]
    for name in column.names:
        for kind, words in kinds.items():
            if column.found.of(kind, name) is not None:
                rows.append((words.format(name=name), column.found.named(kind, name), column.color(name)))
    if full is None or len(rows) < 2:
        return None
    constant = column.found.get(f"{column.found.score}_constant")
    with style_context():
        figure, axes = new_axes(height=1.05 + 0.36 * len(rows), grid="x")
        axes.axvline(as_read(column.found.score, full), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        if constant is not None:
            axes.axvline(as_read(column.found.score, constant), color=NOISE, linewidth=1, linestyle=(0, (1, 2)))
        for index, (_, metric, shade) in enumerate(rows):
            value, reach = as_read(metric, column.found.get(metric) or 0.0), column.found.reach(metric)
            axes.plot([value - reach, value + reach], [index, index], color=shade, linewidth=1.4)
            axes.plot(value, index, "o", color=shade, markersize=6)
        name_rows(axes, [shorten(words, 24) for words, _, _ in rows])
        _score_axis(axes, "x", column)
        shown = ", ".join(f"{words} {column.found.say(column.found.get(metric) or 0.0)}" for words, metric, _ in rows)
        return column.render(figure, test, f"{shown[0].upper()}{shown[1:]}.")


def score(column: ReportColumn) -> FigureBlock | None:
    return without(column, "score", {"alone": "{name} alone"})


def noise(column: ReportColumn) -> FigureBlock | None:
    return without(column, "noise", {"noise": "noise in {name}"})


def masking(column: ReportColumn) -> FigureBlock | None:
    return without(column, "masking", {"mask": "without {name}"})


def response(column: ReportColumn) -> FigureBlock | None:
    """Attention to the other modalities, clean and with one modality replaced by noise."""
    details = column.details("response")
    shares = details.get("shares") or {}
    clean, noisy = as_histogram(shares.get("clean")), as_histogram(shares.get("noise"))
    if clean is None or noisy is None:
        return None
    with style_context():
        figure, axes = new_axes(height=2.6)
        plot_filled(axes, clean, MUTED, "clean")
        plot_outline(axes, noisy, NOISE, f"noise in {details['modality']}")
        axes.set(xlim=(0, 1), yticks=[], xlabel=f"attention not on {details['modality']}")
        percent(axes.xaxis)
        add_legend(axes)
        return column.render(figure, "response", f"Means: clean {_part(clean.mean)}, noise {_part(noisy.mean)}.")


def corruption(column: ReportColumn) -> FigureBlock | None:
    """The score over the noise level, one line for each corrupted modality."""
    return _levels(column, "accuracy", "", column.found.say, lambda axes: _score_axis(axes, "y", column))


def corruption_share(column: ReportColumn) -> FigureBlock | None:
    """Attention share of the corrupted modality over the noise level."""

    def format_share(axes: Axes) -> None:
        percent(axes.yaxis)
        axes.set(ylim=(0, 1), ylabel="attention share")

    return _levels(column, "share", "share-", _part, format_share)


def _levels(
    column: ReportColumn, part: str, prefix: str, say: Callable[[float], str], format_axis: Callable[[Axes], None]
) -> FigureBlock | None:
    curves = {
        name: curve for name, curve in (column.details("corruption").get("curves") or {}).items() if curve.get(part)
    }
    if not curves:
        return None
    with style_context():
        figure, axes = new_axes(height=2.8)
        for name, curve in curves.items():
            drawn = [as_read(column.found.score, value) if part == "accuracy" else value for value in curve[part]]
            axes.plot(curve["levels"], drawn, "o-", color=column.color(name), markersize=4, label=name)
        axes.set_xlabel("noise level")
        format_axis(axes)
        axes.legend(frameon=False, fontsize=9, loc="best")
        ends = ", ".join(f"{name} {say(curve[part][0])} to {say(curve[part][-1])}" for name, curve in curves.items())
        return column.render(figure, f"{prefix}corruption", f"From noise level 0 to 1: {ends}.")


def robustness(column: ReportColumn) -> FigureBlock | None:
    """The score under each corruption, one panel for each modality."""
    details = column.details("robustness")
    if not details.get("rows"):
        return None
    figure = draw_robustness(details["rows"], details["clean"], column.names)
    means = {name: column.found.get(f"robustness/{name}") for name in column.names}
    text = ", ".join(f"{name} {column.found.say(mean)}" for name, mean in means.items() if mean is not None)
    with style_context():
        return column.render(figure, "robustness", f"Mean with damage in {text}.")


def shapley(column: ReportColumn) -> FigureBlock | None:
    worth = {name: value for name in column.names if (value := column.found.get(f"shapley/{name}")) is not None}
    if not worth:
        return None
    score = column.found.score
    drawn = {name: as_read(score, value) for name, value in worth.items()}
    label = f"change of the {metric_label(score)}" if is_error(score) else "contribution to the score"
    return _bars(column, "shapley", drawn, lambda value: column.found.differ(as_read(score, value)), label)


def quag(column: ReportColumn) -> FigureBlock | None:
    """The score under each QUAG operator."""
    full = column.found.get(column.found.score)
    values = {
        m.partition("/")[2]: v
        for m in column.found.metrics
        if m.startswith("quag/") and (v := column.found.get(m)) is not None
    }
    if full is None or not values:
        return None
    rows = {"unmodified": full, **values}
    with style_context():
        figure, axes = new_axes(height=1.05 + 0.36 * len(rows), grid="x")
        axes.axvline(as_read(column.found.score, full), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for index, (operator, value) in enumerate(rows.items()):
            value, reach = (
                as_read(column.found.score, value),
                column.found.reach(f"quag/{operator}" if index else column.found.score),
            )
            axes.plot([value - reach, value + reach], [index, index], color=INK, linewidth=1.4)
            axes.plot(value, index, "o", color=INK if index == 0 else ACCENT, markersize=6)
        name_rows(axes, [shorten(words, 24) for words in rows])
        _score_axis(axes, "x", column)
        averaged = ", ".join(f"{words} {column.found.say(value)}" for words, value in values.items())
        return column.render(figure, "quag", f"Unmodified {column.found.say(full)}; averaged: {averaged}.")


def gradients(column: ReportColumn) -> FigureBlock | None:
    norms = {name: value for name in column.names if (value := column.found.get(f"gradient_output/{name}")) is not None}
    return _bars(column, "gradients", norms, "{:.3g}".format, "gradient norm at the encoder output")


def keys(column: ReportColumn) -> FigureBlock | None:
    """Cosine of the query and the mean key of each modality; the modality under noise as an outline."""
    details = column.details("keys")
    histograms = {n: as_histogram(stats.get("cosine")) for n, stats in (details.get("modalities") or {}).items()}
    histograms = {name: part for name, part in histograms.items() if part is not None}
    if not histograms:
        return None
    replaced = details.get("replaced")
    noisy = as_histogram(((details.get("noise") or {}).get(replaced) or {}).get("cosine"))
    with style_context():
        figure, axes = new_axes(height=2.6)
        for name, part in histograms.items():
            plot_filled(axes, part, column.color(name), name)
        if noisy is not None:
            plot_outline(axes, noisy, NOISE, f"noise in {replaced}")
        axes.set(xlabel="cosine of query and mean key", yticks=[], xlim=plot_span([*histograms.values(), noisy]))
        add_legend(axes)
        return column.render(
            figure, "keys", "Means: " + ", ".join(f"{n} {format_signed(p.mean)}" for n, p in histograms.items()) + "."
        )


def attention(column: ReportColumn) -> FigureBlock | None:
    """Attention shares of every layer as one stacked bar."""
    layers = column.details("attention").get("layers") or []
    rows = [{name: _mean(head[i] for head in row["share"]) for i, name in enumerate(row["names"])} for row in layers]
    if not rows:
        rows = [{n: v for n in column.names if (v := column.found.get(f"share/{n}")) is not None}]
    rows = [row for row in rows if row]
    if not rows:
        return None
    with style_context():
        figure, axes = new_axes(height=1.15 + 0.34 * len(rows), grid="x")
        for index, row in enumerate(rows):
            start = 0.0
            for name, value in row.items():
                axes.barh(index, value, left=start, height=0.62, color=column.color(name), alpha=0.75, linewidth=0)
                start += value
        for name in rows[0]:
            axes.barh(0, 0, color=column.color(name), alpha=0.75, label=name)
        name_rows(axes, [f"layer {index + 1}" for index in range(len(rows))] if layers else ["readout"])
        axes.set_xlim(0, 1)
        percent(axes.xaxis)
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
        summary = "; ".join(", ".join(f"{name} {_part(value)}" for name, value in row.items()) for row in rows)
        return column.render(figure, "attention", f"Shares by layer: {summary}.")


def gap(column: ReportColumn) -> FigureBlock | None:
    gaps = {name: value for name in column.names if (value := column.found.get(f"attention_gap/{name}")) is not None}
    return _bars(column, "gap", gaps, "{:.0f}".format, "attention gap, %") if gaps else None


def collapse(column: ReportColumn) -> FigureBlock | None:
    rows = column.details("collapse").get("layers") or []
    if len(rows) < 2:
        return None
    with style_context():
        figure, axes = new_axes(height=2.6)
        axes.plot(range(len(rows)), [row["mean"] for row in rows], "o-", color=ACCENT, markersize=5)
        axes.set(ylim=(0, 1), xlabel="block (0 is the input)", ylabel="relative residual")
        percent(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return column.render(
            figure, "collapse", "By block: " + ", ".join(f"{_part(row['mean'])}" for row in rows) + "."
        )


def ood(column: ReportColumn) -> FigureBlock | None:
    """Confidence on in-distribution and out-of-distribution inputs."""
    shown = column.details("ood").get("confidence") or {}
    inside, outside = as_histogram(shown.get("in")), as_histogram(shown.get("out"))
    if inside is None or outside is None:
        return None
    with style_context():
        figure, axes = new_axes(height=2.6)
        plot_filled(axes, inside, ACCENT, "in-distribution")
        plot_outline(axes, outside, NOISE, "out-of-distribution")
        axes.set(yticks=[], xlabel=f"confidence ({column.details('ood').get('score')})")
        add_legend(axes)
        return column.render(
            figure,
            "ood",
            f"Means: in-distribution {format_signed(inside.mean)}, out-of-distribution {format_signed(outside.mean)}.",
        )


FIGURES: dict[str, tuple[Callable[[ReportColumn], FigureBlock | None], ...]] = {
    "score": (score,), "noise": (noise,), "masking": (masking,), "response": (response,), "attention": (attention,),
    "corruption": (corruption, corruption_share), "robustness": (robustness,),
    "shapley": (shapley,), "quag": (quag,), "keys": (keys,), "gap": (gap,),
    "consistency": (consistency, spectrum),
    "collapse": (collapse,), "gradients": (gradients,), "ood": (ood,),
}  # fmt: skip
"""Test -> functions of its figures."""


def _bars(
    column: ReportColumn, test: str, values: Mapping[str, float], say: Callable[[float], str], label: str
) -> FigureBlock | None:
    """One bar for each modality, labeled with its value."""
    if not values:
        return None
    with style_context():
        figure, axes = new_axes(height=1.05 + 0.38 * len(values), grid="x")
        reach = max(abs(value) for value in values.values()) or 1.0
        for index, (name, value) in enumerate(values.items()):
            axes.barh(index, value, height=0.56, color=column.color(name), alpha=0.75, linewidth=0)
            axes.text(max(value, 0.0) + 0.02 * reach, index, say(value), va="center", color=INK)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_xlim(min(0.0, 1.1 * min(values.values())), 1.35 * max(max(values.values()), 0.0) or 0.5 * reach)
        name_rows(axes, [shorten(name, 18) for name in values])
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        if test == "shapley" and column.found.fraction:
            axes.xaxis.set_major_formatter(lambda value, _: format_signed(100 * value, 0))
            axes.set_xlabel(f"{label}, points")
        return column.render(figure, test, ", ".join(f"{name} {say(value)}" for name, value in values.items()) + ".")


def _score_axis(axes: Axes, which: Literal["x", "y"], column: ReportColumn) -> None:
    """Formats the axis of the score.

    Fractions range from 0 to 1, so that the figures of several models are comparable.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text(method_title(column.found.score).lower())
    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    if column.found.fraction:
        axes.set(**{f"{which}lim": (0, 1)})
        percent(axis)


def _part(value: float) -> str:
    return f"{100 * value:.0f} %"


def _mean(values: Any) -> float:
    finite = [value for value in values if finite_or_none(value) is not None]
    return sum(finite) / len(finite) if finite else 0.0
