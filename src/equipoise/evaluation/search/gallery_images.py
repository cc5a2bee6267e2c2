"""What was found, as one page that can be sent by mail."""

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
    found: SearchResult, out: str | os.PathLike[str], *, model: str = "", notes: Sequence[str] = ()
) -> Path:
    """Writes the page; nothing in it asks for anything outside it.

    Args:
        found: what ``Index.find`` or ``Index.like`` returned.
        out: the file to write, or a folder, which gets ``gallery.html``.
        model: what the page calls it.
        notes: sentences that are put on top.
    """
    return search_report(result_to_dict(found, model=model, notes=notes), out)


def result_to_dict(found: SearchResult, *, model: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """What was found in JSON's types; pictures as addresses that hold them."""
    return to_jsonable(
        {
            "kind": "search",
            "schema": 1,
            "model": model,
            "notes": list(notes),
            "question": found.question,
            "picture": None if found.picture is None else data_url(found.picture),
            "unseen": found.unseen,
            "entries": found.entries,
            "tied": found.tied,
            "hits": [
                {
                    **hit.entry._asdict(),
                    "rank": hit.rank,
                    "score": hit.score,
                    "picture": None if hit.entry.picture is None else data_url(hit.entry.picture),
                }
                for hit in found.hits
            ],
        }
    )


def data_url(picture: UInt8[Tensor, "height width 3"]) -> str:
    """The picture as PNG inside a data address."""
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
