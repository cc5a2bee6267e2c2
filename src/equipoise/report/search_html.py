"""What a search found in, one self-contained HTML page out: a gallery to look through by mouse or by keyboard."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SchemaError
from ..io.atomic_files import atomic_write
from . import plot_style
from .comparison_page import asset, template
from .text_format import MINUS, join_and, pluralize

SCHEMA = 1


def search_report(content: Mapping[str, Any], out: str | os.PathLike[str]) -> Path:
    """Writes the page; nothing in it asks for anything outside it.

    Args:
        content: what ``search.gallery.told`` gives.
        out: the file to write, or a folder, which gets ``gallery.html``.

    Raises:
        SchemaError: something else.
    """
    out = Path(out)
    return atomic_write(out / "gallery.html" if out.is_dir() else out, search_page(content))


def search_page(content: Mapping[str, Any]) -> str:
    """The page as a text."""
    if not isinstance(content, Mapping) or (content.get("kind"), content.get("schema")) != ("search", SCHEMA):
        raise SchemaError("search_report", expected=f"a search of schema {SCHEMA}", got=_kind(content))
    script = asset("search.js")
    return template("search.html.j2", cosine=cosine, trained=trained).render(
        search=content,
        title=headline(content),
        summary=summary(content),
        notes=[*content["notes"], *unseen(content)],
        best=max([hit["score"] for hit in content["hits"]], default=0.0),
        style=asset("report.css") + asset("search.css"),
        light={variable: light for light, (variable, _) in plot_style.THEME.items()},
        dark=dict(plot_style.THEME.values()),
        script=script,
        # The page runs this one script and loads nothing, whatever a file name or a question may contain.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def headline(content: Mapping[str, Any]) -> str:
    """The question."""
    return f"What is {content['question']}?" if content["image"] else f"“{content['question']}”"


def summary(content: Mapping[str, Any]) -> str:
    """How many were found among how many, and what is cut off."""
    kind = "caption" if content["image"] else "picture"
    said = f"The {pluralize(len(content['hits']), f'nearest {kind}')} of {content['entries']:,}".replace(",", "\u202f")
    return said + (f"; {content['tied']} more are as near as the last." if content["tied"] else ".")


def unseen(content: Mapping[str, Any]) -> list[str]:
    """What the model cannot know of the question."""
    if not content["unseen"]:
        return []
    words = join_and([f"“{word}”" for word in content["unseen"]])
    return [f"No caption of the training has {words}: read by its letters alone."]


def cosine(value: float) -> str:
    """A cosine as it is read.

    Example:
        >>> cosine(0.4567), cosine(-0.2)
        ('0.457', '−0.200')
    """
    return f"{abs(value):.3f}" if value >= 0 else f"{MINUS}{-value:.3f}"


def trained(seen: bool | None) -> str:
    """Whether the model knows it from its training."""
    return {True: "seen in training", False: "not seen in training", None: "your picture"}[seen]


def _kind(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    return f"{content.get('kind', 'no search')} of schema {content.get('schema')}"
