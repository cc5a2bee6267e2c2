"""Diagnoses in, one self-contained HTML page out: the verdict first, then a section for each test that shows it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..results.significance import SURE
from . import plot_style
from .comparison_page import asset, bound, embedded, flat, template
from .diagnosis_figures import FIGURES
from .diagnosis_metrics import is_score, label, ordered, shown, source_of
from .diagnosis_subject import DiagnosisFigure, ReportColumn
from .diagnosis_words import WORDS
from .text_format import join_and, pluralize
from .verdict_list import Verdict, headline

MARKS = {"good": ("✓", "good"), "bad": ("✗", "bad"), "neutral": ("○", "open")}
"""Judgment -> the sign before a verdict, and what a screen reader says for it."""


class DiagnosedModel(NamedTuple):
    """One column of the page: its verdicts, and the tests that did not run."""

    name: str
    headline: str
    verdicts: list[tuple[str, str, str, str]]
    skipped: list[tuple[str, str]]


class DiagnosisSection(NamedTuple):
    """One test, of all models."""

    test: str
    question: str
    shows: str
    misleads: str
    pictures: list[DiagnosisFigure]
    rows: list[tuple[str, list[DiagnosisCell]]]


class DiagnosisCell(NamedTuple):
    """One figure of one model, its difference to the first model's, and whether that is significant."""

    text: str
    note: str
    sure: bool


def diagnosis_page(contents: Sequence[Mapping[str, Any]]) -> str:
    """The page as a text; nothing in it asks for anything outside it.

    Args:
        contents: of one or more models, as ``Diagnosis.to_dict`` gives them.

    Raises:
        ConfigError: no diagnosis at all.
    """
    if not contents:
        raise ConfigError("diagnosis_page", expected="one or more diagnoses", got="none")
    names = tuple(dict.fromkeys(name for content in contents for name in content["names"]))
    contents = _told_apart(contents)
    subjects = [ReportColumn(content, place, names) for place, content in enumerate(contents)]
    models = [_model(subject) for subject in subjects]
    script = asset("diagnosis.js")
    return template("diagnosis.html.j2", bound=bound).render(
        title=models[0].headline if len(models) == 1 else f"{join_and([model.name for model in models])}, side by side",
        subtitle=_subtitle(contents),
        models=models,
        sections=[section for test in WORDS if (section := _section(test, subjects)) is not None],
        explorer=_explorer(subjects),
        level=SURE,
        missing=_missing(subjects),
        protocol=flat(contents[0]["protocol"]),
        environment=flat(contents[0]["environment"]),
        style=asset("report.css") + asset("diagnosis.css"),
        light={variable: shade for shade, (variable, _) in plot_style.THEME.items()},
        dark=dict(plot_style.THEME.values()),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=embedded({"diagnoses": list(contents), "names": list(names)}),
    )


def _told_apart(contents: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Models of one name get a number, so that columns can be told apart."""
    names = [content["name"] for content in contents]
    return [
        {**content, "name": f"{name} ({names[: place + 1].count(name)})"} if names.count(name) > 1 else content
        for place, (content, name) in enumerate(zip(contents, names, strict=True))
    ]


def _subtitle(contents: Sequence[Mapping[str, Any]]) -> str:
    first = contents[0]
    parts = [f"data {first['protocol']['data']}"] if first["protocol"].get("data") else []
    parts += [f"fold {first['fold']}"] if first.get("fold") else []
    sizes = sorted({content["samples"] for content in contents})
    parts += [f"{join_and([str(size) for size in sizes])} samples" if len(sizes) > 1 else pluralize(sizes[0], "sample")]
    parts += [join_and(list(dict.fromkeys(name for content in contents for name in content["names"])))]
    return " · ".join(str(part) for part in parts)


def _model(subject: ReportColumn) -> DiagnosedModel:
    said = [Verdict(**verdict) for verdict in subject.content["verdicts"]]
    lines = [(verdict.text, verdict.ok, *MARKS[verdict.ok], verdict.test) for verdict in said]
    return DiagnosedModel(subject.name, headline(subject.name, said), lines, list(subject.content["skipped"].items()))  # type: ignore[arg-type]


def _section(test: str, subjects: Sequence[ReportColumn]) -> DiagnosisSection | None:
    """What all models show in one test; None where none of them has run it."""
    ran = [subject for subject in subjects if test in subject.content["details"]]
    if not ran:
        return None
    drawn = [draw(subject) for subject in ran for draw in FIGURES.get(test, ())]
    pictures = [picture for picture in drawn if picture is not None]
    return DiagnosisSection(test, *WORDS[test], pictures, _rows(test, subjects))


def _rows(test: str, subjects: Sequence[ReportColumn]) -> list[tuple[str, list[DiagnosisCell]]]:
    """The figures of a test, a column for each model."""
    every = dict.fromkeys(metric for subject in subjects for metric in subject.found.metrics)
    metrics = [metric for metric in ordered(every, WORDS) if source_of(metric) == test]
    return [(label(metric), [_cell(metric, subject, subjects[0]) for subject in subjects]) for metric in metrics]


def _cell(metric: str, subject: ReportColumn, first: ReportColumn) -> DiagnosisCell:
    value = subject.found.get(metric)
    if value is None:
        return DiagnosisCell("–", "", False)
    text, score = shown(metric, value, subject.found.score), is_score(metric)
    reach = subject.found.reach(metric) if score else 0.0
    if reach == reach and reach > 0:
        size = f"{100 * reach:.1f}" if subject.found.fraction else f"{reach:.2g}"
        text = f"{text.removesuffix(' %')} ± {size}" + (" %" if text.endswith("%") else "")
    compared = subject.found.compare(metric, metric, first.found) if score and subject is not first else None
    return DiagnosisCell(
        text, "" if compared is None else subject.found.proof(compared), compared is not None and compared.sure
    )


def _missing(subjects: Sequence[ReportColumn]) -> list[str]:
    """The layers whose attention could not be shown, each with its reason."""
    return [
        f"{subject.name}: {site}: {reason}"
        for subject in subjects
        for site, reason in (subject.details("attention").get("missing") or {}).items()
    ]


def _explorer(subjects: Sequence[ReportColumn]) -> list[tuple[int, str]]:
    """The models whose attention has more than one layer or head to look at."""
    found = []
    for subject in subjects:
        layers = subject.details("attention").get("layers") or []
        if len(layers) > 1 or any(len(row["share"]) > 1 for row in layers):
            found.append((subject.place, subject.name))
    return found
