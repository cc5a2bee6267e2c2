"""Renders an inspection as one self-contained HTML page: attention over the image, heat maps, effects and raw data."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from ..errors import SchemaError
from ..io.atomic_files import atomic_write
from . import look_figures, look_sentences
from .html_page import FigureBlock, render_page
from .look_sentences import MeanShares

SCHEMA = 1


class TokenSpan(NamedTuple):
    """A text token, or a run of tokens of another modality.

    Attributes:
        text: displayed text.
        reader: index among the queries with a stored map; None without one.
        position: in the sequence; None for a run.
        modality: of a run; None for text.
    """

    text: str
    reader: int | None
    position: int | None
    modality: str | None = None


def look_report(content: Mapping[str, Any], out: str | os.PathLike[str]) -> Path:
    """Writes the page of an inspection; it loads no external resources.

    Args:
        content: ``Inspection.to_dict()``, or the content of a ``look.json``.
        out: the file to write, or a folder, in which ``report.html`` is written.

    Raises:
        SchemaError: ``content`` is not an inspection, or has another schema.
    """
    out = Path(out)
    return atomic_write(out / "report.html" if out.is_dir() else out, look_page(content))


def look_page(content: Mapping[str, Any]) -> str:
    """Renders the page as HTML."""
    if not isinstance(content, Mapping) or (content.get("kind"), content.get("schema")) != ("look", SCHEMA):
        raise SchemaError("look_report", expected=f"a look of schema {SCHEMA}", got=_kind(content))
    shares = MeanShares(content)
    return render_page(
        "look",
        data=content,
        filters={"shown": shown},
        look=content,
        title=look_sentences.headline(shares),
        verdict=look_sentences.verdict(shares),
        explained=look_sentences.explained(shares),
        effects=look_sentences.effect_rows(content),
        sinks=look_sentences.sink_rows(content),
        facts=look_sentences.facts(content),
        chips={part: list(_chips(content, part)) for part in ("prompt", "answer")},
        layers=len(content["maps"]["layers"]),
        heads=content["maps"]["by_head"]["shape"][2],
        panels=_figures(shares),
        tiled=look_sentences.tiled_text(content),
        scenes=content.get("scenes") or [{"picture": content["picture"], "grid": content["grid"]}],
    )


def _figures(shares: MeanShares) -> list[FigureBlock]:
    layers = list(range(len(shares.sites)))
    figures = []
    if any(math.isfinite(value) for value in shares.written):
        svg = look_figures.written_by_layer(shares.written, layers)
        figures.append(FigureBlock(Markup(svg), look_sentences.WRITTEN))
    if shares.by_construction:
        return figures
    tables = {view: shares.by_layer(view) for view in ("prompt", "answer")}
    figures.append(
        FigureBlock(
            Markup(look_figures.by_layer(tables, shares.names, layers)),
            "Mean over heads. The queries are all tokens of the prompt, or the tokens that generate the answer.",
        )
    )
    if (target := shares.target) is None:
        return figures
    column = shares.names.index(target)
    figures.append(
        FigureBlock(
            Markup(look_figures.over_layers(*shares.curves(), f"{target} in the answer".capitalize(), layers)),
            look_sentences.sinks_text(shares),
        )
    )
    for view in ("answer", "prompt"):
        title = f"{target} in the {view}".capitalize()
        svg = look_figures.by_head(shares.share[view][..., column], title, f"heads-{view}", column, layers)
        figures.append(FigureBlock(Markup(svg), look_sentences.heads_text(shares, view)))
    return figures


def _chips(content: Mapping[str, Any], part: str) -> list[TokenSpan]:
    """The tokens of one part in order; each run of image or audio tokens is one entry."""
    readers = {reader["place"]: n for n, reader in enumerate(content["maps"]["readers"]) if reader["place"] is not None}
    spans: list[TokenSpan] = []
    tokens = [(index, token) for index, token in enumerate(content["tokens"]) if token["part"] == part]
    for modality, run in itertools.groupby(tokens, key=lambda item: item[1]["modality"]):
        run = list(run)
        if modality in ("text", None):
            spans += [TokenSpan(shown(token["text"]), readers.get(index), index) for index, token in run]
        else:
            spans.append(TokenSpan(f"{modality} × {len(run)}", None, None, modality))
    return spans


def shown(text: str) -> str:
    """The text of a token with visible symbols for spaces and line breaks.

    Example:
        >>> shown(" mat"), shown("  "), shown("\\n"), shown("")
        ('mat', '␣␣', '↵', '∅')
    """
    visible = text.strip(" ") or text.replace(" ", "␣")
    return visible.replace("\n", "↵").replace("\t", "⇥") or "∅"


def _kind(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    return f"{content.get('kind', 'no look')} of schema {content.get('schema')}"
