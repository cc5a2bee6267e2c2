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

from ..record import plain, read, validate, write_whole
from ..significance import SURE
from . import canvas, figures, sentences
from .effects import effect
from .readings import Readings
from .wording import as_read, change, is_error, is_fraction, listed, probability, title, with_spread


class Picture(NamedTuple):
    """A figure and the sentence under it."""

    svg: Markup
    text: str


class Section(NamedTuple):
    """Figures that answer one question."""

    question: str
    intro: str
    pictures: list[Picture]


class Cell(NamedTuple):
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
    content = validate(results, "report") if isinstance(results, Mapping) else read(results)
    out = Path(out)
    return write_whole(out / "report.html" if out.is_dir() else out, page(content))


def page(results: Mapping[str, Any]) -> str:
    """The page as a text.

    Example:
        >>> "<h1>No run yet</h1>" in page({"schema": 1, "protocol": {}, "environment": {}, "runs": [], "summary": []})
        True
    """
    readings = Readings(results)
    script = asset("report.js")
    return template("report.html.j2", bound=bound).render(
        title=sentences.headline(readings),
        subtitle=_subtitle(readings),
        verdict=sentences.verdict(readings),
        attends=bool(readings.dynamic),
        notices=sentences.notices(results),
        columns=[(title(metric), _unit(metric)) for metric in readings.metrics],
        level=SURE,
        rows=[_row(readings, method) for method in readings.methods],
        sections=[section for section in _sections(readings) if section.pictures],
        protocol=flat(results["protocol"]),
        environment=flat(results["environment"]),
        style=asset("report.css"),
        light={variable: light for light, (variable, _) in canvas.THEME.items()},
        dark=dict(canvas.THEME.values()),
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
    text = json.dumps(plain(results), separators=(",", ":"), allow_nan=False)
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


def _subtitle(readings: Readings) -> str:
    """What was compared, in one line: data, folds, and how many runs."""
    runs = readings.runs
    folds = list(dict.fromkeys(str(run["fold"]) for run in runs if run["fold"] is not None))
    parts = [str(readings.protocol["data"])] if readings.protocol.get("data") else []
    parts += [f"fold {listed(folds)}" if len(folds) == 1 else f"folds {listed(folds)}"] if folds else []
    sizes = ((len(readings.methods), "method"), (len({run["seed"] for run in runs}), "seed"), (len(runs), "run"))
    return " · ".join([*parts, *(sentences.counted(number, noun) for number, noun in sizes)])


def _unit(metric: str) -> str:
    return "%" if is_fraction(metric) else "(lower is better)" if is_error(metric) else ""


def _row(readings: Readings, method: str) -> dict[str, Any]:
    rows = [row for metric in readings.metrics if (row := readings.row(method, metric))]
    references = list(dict.fromkeys(row["reference"] for row in rows if row.get("reference")))
    return {
        "method": method,
        "note": " · ".join(
            [*(f"vs {name}" for name in references), sentences.counted(len(readings.of(method)), "run")]
        ),
        "cells": [_cell(readings, method, metric) for metric in readings.metrics],
    }


def _cell(readings: Readings, method: str, metric: str) -> Cell:
    row, n = readings.row(method, metric), len(readings.of(method))
    if row is None:
        return Cell(None, "–", "", False)
    text = with_spread(metric, row["mean"], row["sd"] or None)
    notes, found = [f"n = {row['n']}"] if row["n"] != n else [], effect(readings, method, metric)
    if found is not None and found.difference:
        notes.append(change(metric, found.difference).removesuffix(" points"))
    if found is not None and found.p is not None:
        notes.append(probability(found.p))
    return Cell(as_read(metric, row["mean"]), text, ", ".join(notes), found is not None and found.sure)


def _sections(readings: Readings) -> list[Section]:
    chosen = [m for m in readings.metrics if m.startswith(readings.score) or m == "noise_attention_r"]
    chosen = chosen or readings.metrics[:1]
    dashed = " Dashed: the best single modality; no multimodal model should be worse." if readings.single else ""
    return [
        Section(
            "How good is each method?",
            f"One dot is one {readings.unit}, the bar is the mean, the line one standard deviation.{dashed}",
            _pictures(readings, figures.scores, sentences.scores_text, chosen),
        ),
        Section(
            "What does each change bring?",
            "Each method against its reference on the same seeds, so that lucky seeds cancel. Lines are 95 % intervals "
            "of the mean; one that crosses zero leaves the sign open.",
            _pictures(readings, figures.paired_differences, sentences.differences_text, chosen),
        ),
        *_attention_sections(readings),
    ]


def _attention_sections(readings: Readings) -> list[Section]:
    dynamic, moved = readings.dynamic, readings.noise_modality or "one modality"
    moments = [(method, moment) for method in dynamic for moment in readings.moments(method)]
    return [
        Section(
            f"Does attention leave {moved} when it is destroyed?",
            f"The same test samples twice: whole, and with {moved} replaced by noise. Attention that looks at the "
            "quality of its input moves to the right.",
            _pictures(readings, figures.share_on_noise, sentences.noise_text, dynamic),
        ),
        Section(
            "Where does attention go while the model learns?",
            "The mean over runs, with a band from the lowest to the highest run.",
            _pictures(readings, figures.attention_share, sentences.share_text, dynamic),
        ),
        Section(
            "Why does attention prefer a modality?",
            "Attention follows the angle between the query and the keys. A modality whose keys stand closer is "
            "preferred whatever it contains.",
            _pictures(readings, figures.key_cosines, sentences.keys_text, moments),
        ),
        Section(
            "How uneven is it, and what do the rotations do?",
            "The attention imbalance rate (AIR) over training, and how often the query was rotated.",
            [
                *_pictures(readings, figures.imbalance, sentences.imbalance_text, [()]),
                *_pictures(readings, figures.rotations, sentences.rotations_text, [()]),
            ],
        ),
    ]


def _pictures(
    readings: Readings,
    draw: Callable[..., str | None],
    tell: Callable[..., str],
    subjects: Iterable[str | tuple[str, ...]],
) -> list[Picture]:
    """One picture a subject, where there is anything to show; a sentence is asked for only then."""
    pictures = []
    for subject in subjects:
        which = (subject,) if isinstance(subject, str) else subject
        if (svg := draw(readings, *which)) is not None:
            pictures.append(Picture(Markup(svg), tell(readings, *which)))
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
