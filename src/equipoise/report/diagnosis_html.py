"""Renders one or more diagnoses as one self-contained HTML page: findings first, then one section for each test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..results.significance import SURE
from .diagnosis_figures import FIGURES
from .diagnosis_metrics import is_score, label, ordered, shown, source_of
from .diagnosis_subject import ReportColumn
from .diagnosis_words import WORDS
from .html_page import FigureBlock, flatten_settings, render_page
from .text_format import join_and, pluralize
from .verdict_list import Verdict, headline

MARKS = {"good": ("✓", "good"), "bad": ("✗", "bad"), "neutral": ("○", "inconclusive or neutral")}
"""``Verdict.ok`` -> mark before the finding, and its text for screen readers."""


class DiagnosedModel(NamedTuple):
    """Findings of one model, and the tests that were skipped."""

    name: str
    headline: str
    verdicts: list[tuple[str, str, str, str, str]]
    skipped: list[tuple[str, str]]


class DiagnosisSection(NamedTuple):
    """Results of one test for all models."""

    test: str
    title: str
    shows: str
    misleads: str
    figures: list[FigureBlock]
    rows: list[tuple[str, list[DiagnosisCell]]]


class DiagnosisCell(NamedTuple):
    """One metric of one model, its difference to the first model, and whether the difference is significant."""

    text: str
    note: str
    sure: bool


def diagnosis_page(contents: Sequence[Mapping[str, Any]]) -> str:
    """Renders the page as HTML; it loads no external resources.

    Args:
        contents: one ``Diagnosis.to_dict()`` for each model.

    Raises:
        ConfigError: ``contents`` is empty.
    """
    if not contents:
        raise ConfigError("diagnosis_page", expected="one or more diagnoses", got="none")
    names = tuple(dict.fromkeys(name for content in contents for name in content["names"]))
    contents = _unique_names(contents)
    subjects = [ReportColumn(content, index, names) for index, content in enumerate(contents)]
    models = [_model(subject) for subject in subjects]
    return render_page(
        "diagnosis",
        data={"diagnoses": list(contents), "names": list(names)},
        title=models[0].headline if len(models) == 1 else f"Comparison of {join_and([model.name for model in models])}",
        subtitle=_subtitle(contents),
        models=models,
        sections=[section for test in WORDS if (section := _section(test, subjects)) is not None],
        explorer=_explorer(subjects),
        level=SURE,
        missing=_missing(subjects),
        protocol=flatten_settings(contents[0]["protocol"]),
        environment=flatten_settings(contents[0]["environment"]),
    )


def _unique_names(contents: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Appends a number to names that occur more than once."""
    names = [content["name"] for content in contents]
    return [
        {**content, "name": f"{name} ({names[: index + 1].count(name)})"} if names.count(name) > 1 else content
        for index, (content, name) in enumerate(zip(contents, names, strict=True))
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
    verdicts = [Verdict(**verdict) for verdict in subject.content["verdicts"]]
    lines = [(verdict.text, verdict.ok, *MARKS[verdict.ok], verdict.test) for verdict in verdicts]
    return DiagnosedModel(
        subject.name, headline(subject.name, verdicts), lines, list(subject.content["skipped"].items())
    )


def _section(test: str, subjects: Sequence[ReportColumn]) -> DiagnosisSection | None:
    """The section of one test, or None if no model has a result for it."""
    ran = [subject for subject in subjects if test in subject.content["details"]]
    if not ran:
        return None
    figures = [figure for subject in ran for draw in FIGURES.get(test, ()) if (figure := draw(subject)) is not None]
    return DiagnosisSection(test, *WORDS[test], figures, _rows(test, subjects))


def _rows(test: str, subjects: Sequence[ReportColumn]) -> list[tuple[str, list[DiagnosisCell]]]:
    """The metrics of a test, with one column for each model."""
    every = dict.fromkeys(metric for subject in subjects for metric in subject.found.metrics)
    score = subjects[0].found.score
    metrics = [metric for metric in ordered(every, WORDS, score) if source_of(metric, score) == test]
    return [(label(metric, score), [_cell(metric, subject, subjects[0]) for subject in subjects]) for metric in metrics]


def _cell(metric: str, subject: ReportColumn, first: ReportColumn) -> DiagnosisCell:
    value = subject.found.get(metric)
    if value is None:
        return DiagnosisCell("–", "", False)
    text, score = shown(metric, value, subject.found.score), is_score(metric, subject.found.score)
    reach = subject.found.reach(metric) if score else 0.0
    if reach == reach and reach > 0:
        size = f"{100 * reach:.1f}" if subject.found.fraction else f"{reach:.2g}"
        text = f"{text.removesuffix(' %')} ± {size}" + (" %" if text.endswith("%") else "")
    compared = subject.found.compare(metric, metric, first.found) if score and subject is not first else None
    return DiagnosisCell(
        text, "" if compared is None else subject.found.proof(compared), compared is not None and compared.sure
    )


def _missing(subjects: Sequence[ReportColumn]) -> list[str]:
    """Layers without recorded attention, each with the reason."""
    return [
        f"{subject.name}: {site}: {reason}"
        for subject in subjects
        for site, reason in (subject.details("attention").get("missing") or {}).items()
    ]


def _explorer(subjects: Sequence[ReportColumn]) -> list[tuple[int, str]]:
    """Index and name of the models with more than one layer or head of attention."""
    models = []
    for subject in subjects:
        layers = subject.details("attention").get("layers") or []
        if len(layers) > 1 or any(len(row["share"]) > 1 for row in layers):
            models.append((subject.index, subject.name))
    return models
