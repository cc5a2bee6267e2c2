"""Draws docs/pictures/emoji_searches.png: five searches with a trained run of the recipe emoji_clip.

equipoise compare --config emoji_clip --out runs/emoji_clip
python scripts/emoji_searches.py runs/emoji_clip/runs/all/info_nce/seed0
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from equipoise.data import load_dataset
from equipoise.evaluation.search import image_entries
from equipoise.report.search_sheet import SheetRow, contact_sheet
from equipoise.training import load as load_run

TARGET = Path(__file__).parents[1] / "docs/pictures/emoji_searches.png"
QUERIES = ("red heart", "blue heart", "woman firefighter", "kissing cat", "dark skin hand")
"""A name in the training split, three held-out names, and words that are not a name."""


def main(folder: Path) -> None:
    index = image_entries(load_run(folder), load_dataset("emoji"))
    rows = []
    for query in QUERIES:
        hits = index.search_by_text(query, top=6).hits
        rows.append(SheetRow(query, [(h.entry.name, h.score, h.entry.image, bool(h.entry.seen)) for h in hits]))
    sheet = Image.open(io.BytesIO(contact_sheet(rows)))
    sheet.quantize(256, dither=Image.Dither.NONE).save(TARGET, optimize=True)
    print(TARGET)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
