"""Writes the results of a comparison as one self-contained HTML page: findings, table, figures and raw data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from ..results.result_rows import atomic_write, load_results, validate_results
from ..results.significance import SURE
from ..results.task_metrics import METRICS
from . import comparison_figures, comparison_text, damage_figure
from .effect_sizes import effect
from .html_page import FigureBlock, flatten_settings, render_page
from .results_view import ResultsView
from .text_format import (
    as_read,
    format_delta,
    format_p,
    format_value,
    is_error,
    is_fraction,
    join_and,
    method_title,
    named_metric,
    with_spread,
)


class PageSection(NamedTuple):
    """A section of figures with a title and an introduction."""

    title: str
    intro: str
    figures: list[FigureBlock]


class TableCell(NamedTuple):
    """One metric of one method.

    Attributes:
        order: sort key; None without a value.
        text: formatted mean and standard deviation.
        note: comparison with the reference, below the value.
        sure: whether the difference is significant.
    """

    order: float | None
    text: str
    note: str
    sure: bool


def report(results: Mapping[str, Any] | str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Writes the report of a comparison as a page that loads no external resources.

    Args:
        results: the content of a ``results.json``, its path, or the path of its folder. Results of interrupted or
            partial comparisons are accepted; missing parts are omitted.
        out: the file to write, or a folder, in which ``report.html`` is written.

    Returns:
        The path of the page.

    Raises:
        SchemaError: ``results`` are not results, or have another schema.
        DataError: the results file does not exist.
    """
    content = validate_results(results, "report") if isinstance(results, Mapping) else load_results(results)
    out = Path(out)
    return atomic_write(out / "report.html" if out.is_dir() else out, page(content))


def page(results: Mapping[str, Any]) -> str:
    """Renders the report as HTML.

    Example:
        >>> "<h1>No run yet</h1>" in page({"schema": 1, "protocol": {}, "environment": {}, "runs": [], "summary": []})
        True
    """
    readings = ResultsView(results)
    return render_page(
        "report",
        data=results,
        title=comparison_text.headline(readings),
        subtitle=_subtitle(readings),
        verdict=comparison_text.verdict(readings),
        attends=bool(readings.dynamic),
        notices=comparison_text.notices(results),
        columns=[(method_title(metric), _unit(metric)) for metric in readings.metrics],
        level=SURE,
        rows=[_row(readings, method) for method in readings.methods],
        sections=[section for section in _sections(readings) if section.figures],
        protocol=flatten_settings(results["protocol"]),
        environment=flatten_settings(results["environment"]),
    )


def _subtitle(readings: ResultsView) -> str:
    """One line with the data set, the folds and the numbers of methods, seeds and runs."""
    runs = readings.runs
    folds = list(dict.fromkeys(str(run["fold"]) for run in runs if run["fold"] is not None))
    parts = [str(readings.protocol["data"])] if readings.protocol.get("data") else []
    parts += [f"fold {join_and(folds)}" if len(folds) == 1 else f"folds {join_and(folds)}"] if folds else []
    sizes = ((len(readings.methods), "method"), (len({run["seed"] for run in runs}), "seed"), (len(runs), "run"))
    return " · ".join([*parts, *(comparison_text.pluralize(number, noun) for number, noun in sizes)])


def _unit(metric: str) -> str:
    return "%" if is_fraction(metric) else "(lower is better)" if is_error(metric) else ""


def _row(readings: ResultsView, method: str) -> dict[str, Any]:
    rows = [row for metric in readings.metrics if (row := readings.row(method, metric))]
    references = list(dict.fromkeys(row["reference"] for row in rows if row.get("reference")))
    return {
        "method": method,
        "note": " · ".join(
            [*(f"vs {name}" for name in references), comparison_text.pluralize(len(readings.of(method)), "run")]
        ),
        "cells": [_cell(readings, method, metric) for metric in readings.metrics],
    }


def _cell(readings: ResultsView, method: str, metric: str) -> TableCell:
    row, n = readings.row(method, metric), len(readings.of(method))
    if row is None:
        return TableCell(None, "–", "", False)
    text = with_spread(metric, row["mean"], row["sd"] or None)
    notes = [f"n = {row['n']}"] if row["n"] != n else []
    if (over := readings.interval(method, metric)) is not None:
        low, high = (format_value(metric, end, unit=False) for end in sorted(as_read(metric, e) for e in over))
        notes.append(f"95 % over samples: {low} to {high}")
    change = effect(readings, method, metric)
    if change is not None and change.difference:
        notes.append(format_delta(metric, change.difference).removesuffix(" points"))
    if change is not None and change.p is not None:
        notes.append(format_p(change.p))
    return TableCell(as_read(metric, row["mean"]), text, ", ".join(notes), change is not None and change.sure)


def _sections(readings: ResultsView) -> list[PageSection]:
    chosen = [m for m in readings.metrics if _belongs(m, readings.score) or m == "noise_attention_r"]
    chosen = chosen or readings.metrics[:1]
    dashed = " Dashed line: best unimodal baseline." if readings.single else ""
    return [
        PageSection(
            "Score under damage",
            "Each panel damages one modality of the test samples. The dashed line is the best modality that is intact, "
            "alone: a fusion that is worse would do better without the damaged modality. Dots are runs; lines and the "
            "band are 95 % confidence intervals of the mean over runs.",
            _figures(readings, damage_figure.damage, damage_figure.damage_text, damage_figure.damage_metrics(readings)),
        ),
        PageSection(
            "Scores by method",
            f"Each dot is one {readings.unit}; the bar is the mean and the line one standard deviation.{dashed}",
            _figures(readings, comparison_figures.scores, comparison_text.scores_text, chosen),
        ),
        PageSection(
            "Paired differences to the reference",
            "Difference of each method to its reference on the same seeds. Lines are 95 % confidence intervals of the "
            "mean; an interval that contains zero does not determine the sign.",
            _figures(readings, comparison_figures.paired_differences, comparison_text.differences_text, chosen),
        ),
        *_attention_sections(readings),
    ]


def _belongs(metric: str, score: str) -> bool:
    """Whether a metric is the main one, under any condition, and not another one with the same prefix."""
    known_metric = named_metric(metric)
    return metric.startswith(score) and (known_metric is None or score not in METRICS or known_metric.name == score)


def _attention_sections(readings: ResultsView) -> list[PageSection]:
    dynamic, moved = readings.dynamic, readings.noise_modality or "one modality"
    moments = [(method, moment) for method in dynamic for moment in readings.moments(method)]
    return [
        PageSection(
            f"Response of attention to noise in {moved}",
            f"Attention on the same test samples, clean and with {moved} replaced by noise. Attention that responds to "
            "input quality moves to the right.",
            _figures(readings, comparison_figures.share_on_noise, comparison_text.noise_text, dynamic),
        ),
        PageSection(
            "Attention shares during training",
            "Mean over runs; the band spans the lowest to the highest run.",
            _figures(readings, comparison_figures.attention_share, comparison_text.share_text, dynamic),
        ),
        PageSection(
            "Query–key geometry",
            "Attention logits depend on the angle between the query and the keys. A modality whose keys have a larger "
            "cosine with the query receives more attention regardless of its content.",
            _figures(readings, comparison_figures.key_cosines, comparison_text.keys_text, moments),
        ),
        PageSection(
            "Attention imbalance and query rotations",
            "Attention imbalance rate (AIR) during training, and the number of rotations of the query.",
            [
                *_figures(readings, comparison_figures.imbalance, comparison_text.imbalance_text, [()]),
                *_figures(readings, comparison_figures.rotations, comparison_text.rotations_text, [()]),
            ],
        ),
    ]


def _figures(
    readings: ResultsView,
    draw: Callable[..., str | None],
    describe: Callable[..., str],
    subjects: Iterable[str | tuple[str, ...]],
) -> list[FigureBlock]:
    """The figure and caption of each subject that has data."""
    blocks = []
    for subject in subjects:
        arguments = (subject,) if isinstance(subject, str) else subject
        if (svg := draw(readings, *arguments)) is not None:
            blocks.append(FigureBlock(Markup(svg), describe(readings, *arguments)))
    return blocks
