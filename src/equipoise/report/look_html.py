"""A look in, one self-contained HTML page out: the picture under attention, heat maps, effects and the raw numbers."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from ..errors import SchemaError
from ..io.atomic_files import atomic_write
from . import look_figures, look_sentences, plot_style
from .comparison_page import FigureBlock, bound, embedded, template
from .look_sentences import MeanShares

SCHEMA = 1


class TokenSpan(NamedTuple):
    """A token as the page shows it, or a run of those that are no words.

    Attributes:
        text: what is read.
        reader: its number among those that can be chosen; None where it cannot.
        place: in the sequence; None for a run.
        modality: of a run that is no text, else None.
    """

    text: str
    reader: int | None
    place: int | None
    modality: str | None = None


def look_report(content: Mapping[str, Any], out: str | os.PathLike[str]) -> Path:
    """Writes the page; nothing in it asks for anything outside it.

    Args:
        content: what ``Look.to_dict`` gives, or ``look.json`` holds.
        out: the file to write, or a folder, which gets ``report.html``.

    Raises:
        SchemaError: something else.
    """
    out = Path(out)
    return atomic_write(out / "report.html" if out.is_dir() else out, look_page(content))


def look_page(content: Mapping[str, Any]) -> str:
    """The page as a text."""
    if not isinstance(content, Mapping) or (content.get("kind"), content.get("schema")) != ("look", SCHEMA):
        raise SchemaError("look_report", expected=f"a look of schema {SCHEMA}", got=_kind(content))
    shares = MeanShares(content)
    script = _asset("look.js")
    return template("look.html.j2", bound=bound, shown=shown).render(
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
        pictures=_pictures(shares),
        style=_asset("report.css") + _asset("look.css"),
        light={variable: light for light, (variable, _) in plot_style.THEME.items()},
        dark=dict(plot_style.THEME.values()),
        script=script,
        # The page runs this one script and loads nothing, whatever a token may contain.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=embedded(content),
    )


def _pictures(shares: MeanShares) -> list[FigureBlock]:
    layers = list(range(len(shares.sites)))
    tables = {view: shares.by_layer(view) for view in ("prompt", "answer")}
    found = [
        FigureBlock(
            Markup(look_figures.by_layer(tables, shares.names, layers)),
            "Mean over heads. In the prompt, all its tokens read; in the answer, those that write it.",
        )
    ]
    if (target := shares.target) is None:
        return found
    column = shares.names.index(target)
    found.append(
        FigureBlock(
            Markup(look_figures.over_layers(*shares.curves(), f"{target} in the answer".capitalize(), layers)),
            look_sentences.sinks_text(shares),
        )
    )
    for view in ("answer", "prompt"):
        title = f"{target} in the {view}".capitalize()
        svg = look_figures.by_head(shares.share[view][..., column], title, f"heads-{view}", column, layers)
        found.append(FigureBlock(Markup(svg), look_sentences.heads_text(shares, view)))
    return found


def _chips(content: Mapping[str, Any], part: str) -> list[TokenSpan]:
    """The tokens of one part in their order; pictures and sounds as one chip."""
    chosen = {reader["place"]: n for n, reader in enumerate(content["maps"]["readers"]) if reader["place"] is not None}
    found: list[TokenSpan] = []
    tokens = [(place, token) for place, token in enumerate(content["tokens"]) if token["part"] == part]
    for modality, run in itertools.groupby(tokens, key=lambda item: item[1]["modality"]):
        run = list(run)
        if modality in ("text", None):
            found += [TokenSpan(shown(token["text"]), chosen.get(place), place) for place, token in run]
        else:
            found.append(TokenSpan(f"{modality} × {len(run)}", None, None, modality))
    return found


def shown(text: str) -> str:
    """A token that can be seen, spaces and line breaks too.

    Example:
        >>> shown(" mat"), shown("  "), shown("\\n"), shown("")
        ('mat', '␣␣', '↵', '∅')
    """
    seen = text.strip(" ") or text.replace(" ", "␣")
    return seen.replace("\n", "↵").replace("\t", "⇥") or "∅"


def _asset(name: str) -> Markup:
    """A file that is ours, put in as it is."""
    return Markup((files("equipoise.report") / "templates" / name).read_text(encoding="utf-8"))


def _kind(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    return f"{content.get('kind', 'no look')} of schema {content.get('schema')}"
