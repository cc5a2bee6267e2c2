"""Renders questions under several conditions as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from .html_page import FigureBlock, render_page
from .steering_figure import steering_figures
from .text_format import MINUS, format_p

MOST_ROWS = 200
"""Number of questions on the page; the csv file has all."""


def questions_page(content: Mapping[str, Any]) -> str:
    """Renders the page; ``content`` is ``QuestionResult.to_dict()``."""
    order = {"needs it": 0, "answered without it": 1, "not answered": 2, "failed": 3}
    rows = sorted(content["rows"], key=lambda row: order[row["class"]])
    # The same number of each class, so that examples of all are shown.
    quota = max(MOST_ROWS // max(len({row["class"] for row in rows}), 1), 1)
    counts: dict[str, int] = {}
    shown = []
    for row in rows:
        counts[row["class"]] = counts.get(row["class"], 0) + 1
        if counts[row["class"]] <= quota:
            shown.append(row)
    return render_page(
        "questions",
        title=headline(content),
        result=content,
        shown=shown,
        panels=[
            FigureBlock(Markup(svg), caption)
            for svg, caption in steering_figures(content.get("steering") or (), content["medium"])
        ],
        filters={"percent": percent, "points": points, "interval": interval, "p_value": format_p},
    )


def headline(content: Mapping[str, Any]) -> str:
    """Title of the page: the fraction of questions that do not need the image or sound.

    Example:
        >>> headline({"as_well": 0.612, "medium": "image"}), headline({"as_well": None, "medium": "image"})
        ('61 % of the questions are answered as well without the image', 'Questions under several conditions')
    """
    medium = {"image": "the image", "audio": "the audio"}.get(content["medium"], "the media")
    if content["as_well"] is None:
        return "Questions under several conditions"
    return f"{100 * content['as_well']:.0f} % of the questions are answered as well without {medium}"


def points(value: float | None) -> str:
    """A difference of two fractions in percentage points.

    Example:
        >>> points(0.25), points(-0.5)
        ('25.0', '−50.0')
    """
    return "–" if value is None else f"{100 * value:z.1f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """A fraction in percent.

    Example:
        >>> percent(0.5), percent(None)
        ('50.0 %', '–')
    """
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(value: list[float] | None) -> str:
    """An interval of fractions in percent.

    Example:
        >>> interval([0.25, 0.5])
        '25.0 to 50.0'
    """
    return "–" if value is None else f"{points(value[0])} to {points(value[1])}"
