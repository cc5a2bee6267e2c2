"""Results in, one self-contained HTML page out: table, figures, sentences and the raw numbers."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from ..results.result_rows import atomic_write, load_results, to_jsonable, validate_results
from ..results.significance import SURE
from . import comparison_figures, comparison_text, plot_style
from .effect_sizes import effect
from .results_view import ResultsView
from .text_format import as_read, format_delta, format_p, is_error, is_fraction, join_and, method_title, with_spread


class FigureBlock(NamedTuple):
    """A figure and the sentence under it."""

    svg: Markup
    text: str


class PageSection(NamedTuple):
    """Figures that answer one question."""

    question: str
    intro: str
    pictures: list[FigureBlock]


class TableCell(NamedTuple):
    """One figure of one method: the order it sorts by, what is read, and the comparison below."""

    order: float | None
    text: str
    note: str
    sure: bool


def report(results: Mapping[str, Any] | str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Writes the page; nothing in it asks for anything outside it.

    Args:
        results: what ``record.results`` builds, or the path of a ``results.json`` or its folder. Interrupted and
            partial comparisons are welcome: what is missing is left out.
        out: the file to write, or a folder, which gets ``report.html``.

    Returns:
        the path of the page.

    Raises:
        SchemaError: results of another schema, or not results at all.
        DataError: no such results file.
    """
    content = validate_results(results, "report") if isinstance(results, Mapping) else load_results(results)
    out = Path(out)
    return atomic_write(out / "report.html" if out.is_dir() else out, page(content))


def page(results: Mapping[str, Any]) -> str:
    """The page as a text.

    Example:
        >>> "<h1>No run yet</h1>" in page({"schema": 1, "protocol": {}, "environment": {}, "runs": [], "summary": []})
        True
    """
    readings = ResultsView(results)
    script = asset("report.js")
    return template("report.html.j2", bound=bound).render(
        title=comparison_text.headline(readings),
        subtitle=_subtitle(readings),
        verdict=comparison_text.verdict(readings),
        attends=bool(readings.dynamic),
        notices=comparison_text.notices(results),
        columns=[(method_title(metric), _unit(metric)) for metric in readings.metrics],
        level=SURE,
        rows=[_row(readings, method) for method in readings.methods],
        sections=[section for section in _sections(readings) if section.pictures],
        protocol=flat(results["protocol"]),
        environment=flat(results["environment"]),
        style=asset("report.css"),
        light={variable: light for light, (variable, _) in plot_style.THEME.items()},
        dark=dict(plot_style.THEME.values()),
        script=script,
        # The page runs this one script and loads nothing, whatever a name in the results may contain.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=embedded(results),
    )


def bound(text: str) -> str:
    """The text with no line break inside a figure: between number and unit, around ± and after "p =".

    Example:
        >>> bound("66.2 ± 1.8 % on 5 seeds, p < 0.001").split(" ")
        ['66.2\\xa0±\\xa01.8\\xa0%', 'on', '5\\xa0seeds,', 'p\\xa0<\\xa00.001']
    """
    return re.sub(
        r"(?<=\d) (?=%|±|points|seed|run)|(?<=±) | (?=[=<] )|(?<=epoch) (?=\d)|(?<=[=<]) ", "\N{NO-BREAK SPACE}", text
    )


def embedded(results: Mapping[str, Any]) -> Markup:
    """The results as JSON that no text inside can break out of its script element.

    Example:
        >>> print(embedded({"method": "</script><!--"}))
        {"method":"\\u003c/script\\u003e\\u003c!--"}
    """
    text = json.dumps(to_jsonable(results), separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def template(name: str, **filters: Callable[..., Any]) -> Template:
    """A page to be filled in; whatever is put into it is escaped, and a value that lacks is an error."""
    templates = Environment(
        loader=PackageLoader("equipoise.report", "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= filters
    return templates.get_template(name)


def asset(name: str) -> Markup:
    """A file that is ours, put in as it is."""
    return Markup((files("equipoise.report") / "templates" / name).read_text(encoding="utf-8"))


def _subtitle(readings: ResultsView) -> str:
    """What was compared, in one line: data, folds, and how many runs."""
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
    notes, found = [f"n = {row['n']}"] if row["n"] != n else [], effect(readings, method, metric)
    if found is not None and found.difference:
        notes.append(format_delta(metric, found.difference).removesuffix(" points"))
    if found is not None and found.p is not None:
        notes.append(format_p(found.p))
    return TableCell(as_read(metric, row["mean"]), text, ", ".join(notes), found is not None and found.sure)


def _sections(readings: ResultsView) -> list[PageSection]:
    chosen = [m for m in readings.metrics if m.startswith(readings.score) or m == "noise_attention_r"]
    chosen = chosen or readings.metrics[:1]
    dashed = " Dashed: the best single modality; no multimodal model should be worse." if readings.single else ""
    return [
        PageSection(
            "How good is each method?",
            f"One dot is one {readings.unit}, the bar is the mean, the line one standard deviation.{dashed}",
            _pictures(readings, comparison_figures.scores, comparison_text.scores_text, chosen),
        ),
        PageSection(
            "What does each change bring?",
            "Each method against its reference on the same seeds, so that lucky seeds cancel. Lines are 95 % intervals "
            "of the mean; one that crosses zero leaves the sign open.",
            _pictures(readings, comparison_figures.paired_differences, comparison_text.differences_text, chosen),
        ),
        *_attention_sections(readings),
    ]


def _attention_sections(readings: ResultsView) -> list[PageSection]:
    dynamic, moved = readings.dynamic, readings.noise_modality or "one modality"
    moments = [(method, moment) for method in dynamic for moment in readings.moments(method)]
    return [
        PageSection(
            f"Does attention leave {moved} when it is destroyed?",
            f"The same test samples twice: whole, and with {moved} replaced by noise. Attention that looks at the "
            "quality of its input moves to the right.",
            _pictures(readings, comparison_figures.share_on_noise, comparison_text.noise_text, dynamic),
        ),
        PageSection(
            "Where does attention go while the model learns?",
            "The mean over runs, with a band from the lowest to the highest run.",
            _pictures(readings, comparison_figures.attention_share, comparison_text.share_text, dynamic),
        ),
        PageSection(
            "Why does attention prefer a modality?",
            "Attention follows the angle between the query and the keys. A modality whose keys stand closer is "
            "preferred whatever it contains.",
            _pictures(readings, comparison_figures.key_cosines, comparison_text.keys_text, moments),
        ),
        PageSection(
            "How uneven is it, and what do the rotations do?",
            "The attention imbalance rate (AIR) over training, and how often the query was rotated.",
            [
                *_pictures(readings, comparison_figures.imbalance, comparison_text.imbalance_text, [()]),
                *_pictures(readings, comparison_figures.rotations, comparison_text.rotations_text, [()]),
            ],
        ),
    ]


def _pictures(
    readings: ResultsView,
    draw: Callable[..., str | None],
    tell: Callable[..., str],
    subjects: Iterable[str | tuple[str, ...]],
) -> list[FigureBlock]:
    """One picture a subject, where there is anything to show; a sentence is asked for only then."""
    pictures = []
    for subject in subjects:
        which = (subject,) if isinstance(subject, str) else subject
        if (svg := draw(readings, *which)) is not None:
            pictures.append(FigureBlock(Markup(svg), tell(readings, *which)))
    return pictures


def flat(part: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows: ``optimizer.lr``, ``0.001``."""
    rows = []
    for key, value in part.items():
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) or "–"))
        else:
            rows.append((f"{prefix}{key}", "–" if value is None else str(value)))
    return rows
