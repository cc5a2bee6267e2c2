"""Pictures of one diagnosis: a function for each test, its content in, a picture out, or None where it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..results.result_rows import finite_or_none
from .diagnosis_consistency import consistency, spectrum
from .diagnosis_subject import DiagnosisFigure, ReportColumn
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
from .text_format import as_read, format_signed, is_error, method_title, metric_label


def without(of: ReportColumn, test: str, kinds: Mapping[str, str]) -> DiagnosisFigure | None:
    """The score as it is and under each condition, with its 95 % interval."""
    full = of.found.get(of.found.score)
    rows: list[tuple[str, str, str]] = [] if full is None else [("as it is", of.found.score, INK)]
    for name in of.names:
        for kind, words in kinds.items():
            if of.found.of(kind, name) is not None:
                rows.append((words.format(name=name), of.found.named(kind, name), of.color(name)))
    if full is None or len(rows) < 2:
        return None
    constant = of.found.get(f"{of.found.score}_constant")
    with style_context():
        figure, axes = new_axes(height=1.05 + 0.36 * len(rows), grid="x")
        axes.axvline(as_read(of.found.score, full), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        if constant is not None:
            axes.axvline(as_read(of.found.score, constant), color=NOISE, linewidth=1, linestyle=(0, (1, 2)))
        for place, (_, metric, shade) in enumerate(rows):
            value, reach = as_read(metric, of.found.get(metric) or 0.0), of.found.reach(metric)
            axes.plot([value - reach, value + reach], [place, place], color=shade, linewidth=1.4)
            axes.plot(value, place, "o", color=shade, markersize=6)
        name_rows(axes, [shorten(words, 24) for words, _, _ in rows])
        _score_axis(axes, "x", of)
        shown = ", ".join(f"{words} {of.found.say(of.found.get(metric) or 0.0)}" for words, metric, _ in rows)
        return of.picture(figure, test, f"{shown[0].upper()}{shown[1:]}.")


def score(of: ReportColumn) -> DiagnosisFigure | None:
    return without(of, "score", {"alone": "{name} alone"})


def noise(of: ReportColumn) -> DiagnosisFigure | None:
    return without(of, "noise", {"noise": "{name} as noise"})


def masking(of: ReportColumn) -> DiagnosisFigure | None:
    return without(of, "masking", {"mask": "without {name}"})


def response(of: ReportColumn) -> DiagnosisFigure | None:
    """Attention that goes to the other modalities, clean and with one modality as noise."""
    details = of.details("response")
    shares = details.get("shares") or {}
    clean, noisy = as_histogram(shares.get("clean")), as_histogram(shares.get("noise"))
    if clean is None or noisy is None:
        return None
    with style_context():
        figure, axes = new_axes(height=2.6)
        plot_filled(axes, clean, MUTED, "clean")
        plot_outline(axes, noisy, NOISE, f"{details['modality']} as noise")
        axes.set(xlim=(0, 1), yticks=[], xlabel=f"attention that does not go to {details['modality']}")
        percent(axes.xaxis)
        add_legend(axes)
        return of.picture(figure, "response", f"Means: clean {_part(clean.mean)}, noise {_part(noisy.mean)}.")


def corruption(of: ReportColumn) -> DiagnosisFigure | None:
    """The score over the level of noise, one line for each modality that is damaged."""
    return _levels(of, "accuracy", "", of.found.say, lambda axes: _score_axis(axes, "y", of))


def followed(of: ReportColumn) -> DiagnosisFigure | None:
    """Attention to the damaged modality over the level of noise."""

    def whole(axes: Axes) -> None:
        percent(axes.yaxis)
        axes.set(ylim=(0, 1), ylabel="attention to what is damaged")

    return _levels(of, "share", "share-", _part, whole)


def _levels(
    of: ReportColumn, part: str, prefix: str, say: Callable[[float], str], dress: Callable[[Axes], None]
) -> DiagnosisFigure | None:
    curves = {name: curve for name, curve in (of.details("corruption").get("curves") or {}).items() if curve.get(part)}
    if not curves:
        return None
    with style_context():
        figure, axes = new_axes(height=2.8)
        for name, curve in curves.items():
            drawn = [as_read(of.found.score, value) if part == "accuracy" else value for value in curve[part]]
            axes.plot(curve["levels"], drawn, "o-", color=of.color(name), markersize=4, label=name)
        axes.set_xlabel("level of noise")
        dress(axes)
        axes.legend(frameon=False, fontsize=9, loc="best")
        ends = ", ".join(f"{name} {say(curve[part][0])} to {say(curve[part][-1])}" for name, curve in curves.items())
        return of.picture(figure, f"{prefix}corruption", f"From no noise to full noise: {ends}.")


def shapley(of: ReportColumn) -> DiagnosisFigure | None:
    worth = {name: value for name in of.names if (value := of.found.get(f"shapley/{name}")) is not None}
    if not worth:
        return None
    score = of.found.score
    drawn = {name: as_read(score, value) for name, value in worth.items()}
    label = f"what it changes in the {metric_label(score)}" if is_error(score) else "what it adds to the score"
    return _bars(of, "shapley", drawn, lambda value: of.found.differ(as_read(score, value)), label)


def quag(of: ReportColumn) -> DiagnosisFigure | None:
    """The score with parts of attention averaged."""
    full = of.found.get(of.found.score)
    found = {
        m.partition("/")[2]: v for m in of.found.metrics if m.startswith("quag/") and (v := of.found.get(m)) is not None
    }
    if full is None or not found:
        return None
    rows = {"as it is": full, **found}
    with style_context():
        figure, axes = new_axes(height=1.05 + 0.36 * len(rows), grid="x")
        axes.axvline(as_read(of.found.score, full), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for place, (operator, value) in enumerate(rows.items()):
            value, reach = (
                as_read(of.found.score, value),
                of.found.reach(f"quag/{operator}" if place else of.found.score),
            )
            axes.plot([value - reach, value + reach], [place, place], color=INK, linewidth=1.4)
            axes.plot(value, place, "o", color=INK if place == 0 else ACCENT, markersize=6)
        name_rows(axes, [shorten(words, 24) for words in rows])
        _score_axis(axes, "x", of)
        averaged = ", ".join(f"{words} {of.found.say(value)}" for words, value in found.items())
        return of.picture(figure, "quag", f"As it is {of.found.say(full)}, averaged {averaged}.")


def gradients(of: ReportColumn) -> DiagnosisFigure | None:
    norms = {name: value for name in of.names if (value := of.found.get(f"gradient_output/{name}")) is not None}
    return _bars(of, "gradients", norms, "{:.3g}".format, "norm of the gradient at the encoder's output")


def keys(of: ReportColumn) -> DiagnosisFigure | None:
    """Cosine between query and mean key of each modality; what noise makes of one of them as an outline."""
    details = of.details("keys")
    found = {n: as_histogram(own.get("cosine")) for n, own in (details.get("modalities") or {}).items()}
    found = {name: part for name, part in found.items() if part is not None}
    if not found:
        return None
    replaced = details.get("replaced")
    noisy = as_histogram(((details.get("noise") or {}).get(replaced) or {}).get("cosine"))
    with style_context():
        figure, axes = new_axes(height=2.6)
        for name, part in found.items():
            plot_filled(axes, part, of.color(name), name)
        if noisy is not None:
            plot_outline(axes, noisy, NOISE, f"{replaced} as noise")
        axes.set(xlabel="cosine of query and mean key", yticks=[], xlim=plot_span([*found.values(), noisy]))
        add_legend(axes)
        return of.picture(
            figure, "keys", "Means: " + ", ".join(f"{n} {format_signed(p.mean)}" for n, p in found.items()) + "."
        )


def attention(of: ReportColumn) -> DiagnosisFigure | None:
    """Attention of every layer as one bar: its modalities, and special tokens."""
    layers = of.details("attention").get("layers") or []
    rows = [{name: _mean(head[i] for head in row["share"]) for i, name in enumerate(row["names"])} for row in layers]
    if not rows:
        rows = [{n: v for n in of.names if (v := of.found.get(f"share/{n}")) is not None}]
    rows = [row for row in rows if row]
    if not rows:
        return None
    with style_context():
        figure, axes = new_axes(height=1.15 + 0.34 * len(rows), grid="x")
        for place, row in enumerate(rows):
            start = 0.0
            for name, value in row.items():
                axes.barh(place, value, left=start, height=0.62, color=of.color(name), alpha=0.75, linewidth=0)
                start += value
        for name in rows[0]:
            axes.barh(0, 0, color=of.color(name), alpha=0.75, label=name)
        name_rows(axes, [f"layer {place + 1}" for place in range(len(rows))] if layers else ["readout"])
        axes.set_xlim(0, 1)
        percent(axes.xaxis)
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
        said = "; ".join(", ".join(f"{name} {_part(value)}" for name, value in row.items()) for row in rows)
        return of.picture(figure, "attention", f"From the first layer: {said}.")


def gap(of: ReportColumn) -> DiagnosisFigure | None:
    gaps = {name: value for name in of.names if (value := of.found.get(f"attention_gap/{name}")) is not None}
    return _bars(of, "gap", gaps, "{:.0f}".format, "gap between own and other modalities, %") if gaps else None


def collapse(of: ReportColumn) -> DiagnosisFigure | None:
    rows = of.details("collapse").get("layers") or []
    if len(rows) < 2:
        return None
    with style_context():
        figure, axes = new_axes(height=2.6)
        axes.plot(range(len(rows)), [row["mean"] for row in rows], "o-", color=ACCENT, markersize=5)
        axes.set(ylim=(0, 1), xlabel="block (0 is the input)", ylabel="part that differs")
        percent(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return of.picture(figure, "collapse", "By block: " + ", ".join(f"{_part(row['mean'])}" for row in rows) + ".")


def ood(of: ReportColumn) -> DiagnosisFigure | None:
    """Confidence of known and of unknown inputs."""
    shown = of.details("ood").get("confidence") or {}
    inside, outside = as_histogram(shown.get("in")), as_histogram(shown.get("out"))
    if inside is None or outside is None:
        return None
    with style_context():
        figure, axes = new_axes(height=2.6)
        plot_filled(axes, inside, ACCENT, "known")
        plot_outline(axes, outside, NOISE, "unknown")
        axes.set(yticks=[], xlabel=f"confidence ({of.details('ood').get('score')}), more sure to the right")
        add_legend(axes)
        return of.picture(
            figure, "ood", f"Means: known {format_signed(inside.mean)}, unknown {format_signed(outside.mean)}."
        )


FIGURES: dict[str, tuple[Callable[[ReportColumn], DiagnosisFigure | None], ...]] = {
    "score": (score,), "noise": (noise,), "masking": (masking,), "response": (response,), "attention": (attention,),
    "corruption": (corruption, followed), "shapley": (shapley,), "quag": (quag,), "keys": (keys,), "gap": (gap,),
    "consistency": (consistency, spectrum),
    "collapse": (collapse,), "gradients": (gradients,), "ood": (ood,),
}  # fmt: skip
"""Test -> its pictures."""


def _bars(
    of: ReportColumn, test: str, values: Mapping[str, float], say: Callable[[float], str], label: str
) -> DiagnosisFigure | None:
    """One bar for each modality, with its figure at the end."""
    if not values:
        return None
    with style_context():
        figure, axes = new_axes(height=1.05 + 0.38 * len(values), grid="x")
        reach = max(abs(value) for value in values.values()) or 1.0
        for place, (name, value) in enumerate(values.items()):
            axes.barh(place, value, height=0.56, color=of.color(name), alpha=0.75, linewidth=0)
            axes.text(max(value, 0.0) + 0.02 * reach, place, say(value), va="center", color=INK)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_xlim(min(0.0, 1.1 * min(values.values())), 1.35 * max(max(values.values()), 0.0) or 0.5 * reach)
        name_rows(axes, [shorten(name, 18) for name in values])
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        if test == "shapley" and of.found.fraction:
            axes.xaxis.set_major_formatter(lambda value, _: format_signed(100 * value, 0))
            axes.set_xlabel(f"{label}, points")
        return of.picture(figure, test, ", ".join(f"{name} {say(value)}" for name, value in values.items()) + ".")


def _score_axis(axes: Axes, which: Literal["x", "y"], of: ReportColumn) -> None:
    """Fractions from 0 to 1, so that models side by side can be compared by eye."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text(method_title(of.found.score).lower())
    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    if of.found.fraction:
        axes.set(**{f"{which}lim": (0, 1)})
        percent(axis)


def _part(value: float) -> str:
    return f"{100 * value:.0f} %"


def _mean(values: Any) -> float:
    known = [value for value in values if finite_or_none(value) is not None]
    return sum(known) / len(known) if known else 0.0
