"""Writes search results as a single self-contained HTML page."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from ...io.atomic_files import to_jsonable
from ...report.search_html import search_report
from .search_index import SearchResult


def result_gallery(
    result: SearchResult, out: str | os.PathLike[str], *, model: str = "", notes: Sequence[str] = ()
) -> Path:
    """Writes the page, which loads nothing from outside.

    Args:
        result: result of ``SearchIndex.search_by_text`` or ``SearchIndex.search_by_image``.
        out: file to write, or a folder for ``gallery.html``.
        model: name of the model on the page.
        notes: sentences shown at the top.
    """
    return search_report(result_to_dict(result, model=model, notes=notes), out)


def result_to_dict(result: SearchResult, *, model: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Converts a search result to JSON types; images become data URLs."""
    return to_jsonable(
        {
            "kind": "search",
            "schema": 1,
            "model": model,
            "notes": list(notes),
            "question": result.question,
            "image": None if result.image is None else data_url(result.image),
            "unseen": result.unseen,
            "pieces": result.pieces,
            "found": result.found,
            "entries": result.entries,
            "tied": result.tied,
            "hits": [
                {
                    **hit.entry._asdict(),
                    "rank": hit.rank,
                    "score": hit.score,
                    "image": None if hit.entry.image is None else data_url(hit.entry.image),
                }
                for hit in result.hits
            ],
        }
    )


def data_url(image: UInt8[Tensor, "height width 3"]) -> str:
    """Encodes an image as a PNG data URL."""
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
