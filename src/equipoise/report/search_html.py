"""Renders the results of a search as one self-contained HTML page: a gallery with mouse and keyboard navigation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SchemaError
from ..io.atomic_files import atomic_write
from .html_page import render_page
from .text_format import MINUS, join_and, pluralize

SCHEMA = 1


def search_report(content: Mapping[str, Any], out: str | os.PathLike[str]) -> Path:
    """Writes the page of a search; it loads no external resources.

    Args:
        content: search results as a dict of schema 1.
        out: the file to write, or a folder, in which ``gallery.html`` is written.

    Raises:
        SchemaError: ``content`` is not the result of a search, or has another schema.
    """
    out = Path(out)
    return atomic_write(out / "gallery.html" if out.is_dir() else out, search_page(content))


def search_page(content: Mapping[str, Any]) -> str:
    """Renders the page as HTML."""
    if not isinstance(content, Mapping) or (content.get("kind"), content.get("schema")) != ("search", SCHEMA):
        raise SchemaError("search_report", expected=f"a search of schema {SCHEMA}", got=_kind(content))
    return render_page(
        "search",
        filters={"cosine": cosine, "trained": trained},
        search=content,
        title=headline(content),
        summary=summary(content),
        notes=[*content["notes"], *unseen(content)],
        best=max([hit["score"] for hit in content["hits"]], default=0.0),
    )


def headline(content: Mapping[str, Any]) -> str:
    """The query."""
    return f"What is {content['question']}?" if content["image"] else f"“{content['question']}”"


def summary(content: Mapping[str, Any]) -> str:
    """The number of results, of entries, and of ties that were cut off."""
    kind = content.get("found") or ("caption" if content["image"] else "image")
    text = f"{pluralize(len(content['hits']), f'nearest {kind}')} of {content['entries']:,}"
    return text + (f"; {content['tied']} more have the same score as the last one." if content["tied"] else ".")


def unseen(content: Mapping[str, Any]) -> list[str]:
    """A notice on words of the query that are not in the vocabulary of the training captions."""
    if not content["unseen"]:
        return []
    words = join_and([f"“{word}”" for word in content["unseen"]])
    pieces = content.get("pieces", "characters")
    return [f"Not in the training captions: {words}. The model encodes such words by their {pieces} only."]


def cosine(value: float) -> str:
    """A cosine with three decimals and a true minus sign.

    Example:
        >>> cosine(0.4567), cosine(-0.2)
        ('0.457', '−0.200')
    """
    return f"{abs(value):.3f}" if value >= 0 else f"{MINUS}{-value:.3f}"


def trained(in_training: bool | None) -> str:
    """Whether an entry was in the training data."""
    return {True: "seen in training", False: "not seen in training", None: "user image"}[in_training]


def _kind(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    return f"{content.get('kind', 'no search')} of schema {content.get('schema')}"
