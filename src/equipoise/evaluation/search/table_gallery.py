"""Search over the pairs of a table: entries, their embeddings, and queries that are read like the columns."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ...data.sets.manifest import ManifestDataset
from ...data.tables.cell_readers import read_image
from ...errors import ConfigError, DataError
from .search_index import BATCH, THUMBNAIL, IndexEntry, SearchIndex, embed_batch

if TYPE_CHECKING:
    from ...data.tables.file_readers import FileReader
    from ...data.tables.modality_readers import Read
    from ...data.tables.value_readers import TextReader
    from ...models.dual_encoder import DualEncoder

FOUND = {"image": "image", "text": "caption", "audio": "recording"}
"""Kind of a column -> what a result is called."""
PREFERRED = ("image", "text", "audio")
"""Kinds that a query finds first, if the model has more than two columns."""
SHOWN = 3
"""Texts of an image that are shown beside its name."""


class TableGallery:
    """The pairs of a table as entries of a search.

    Args:
        source: data set of a table with a pair of columns.

    Attributes:
        words: encodes queries; see ``TextReader.encode`` and ``unseen``.
    """

    def __init__(self, source: ManifestDataset) -> None:
        self.source, self.words = source, self
        self.kinds = {name: one.kind for name, one in source.manifest.modalities.items()}
        self.rows = np.sort(np.concatenate(list(source.rows.values())))
        self._training = set(source.rows["train"].tolist())

    def named(self, kind: str) -> str:
        """Returns the modality of a kind of query.

        Raises:
            ConfigError: the model has none of this kind.
        """
        for name, own in self.kinds.items():
            if own == kind:
                return name
        have = " and ".join(f"{kind} ({name})" for name, kind in self.kinds.items())
        raise ConfigError(
            "search", expected=f"a model with a column of kind {kind}", got=f"one of {have}",
            fix="Search with the kind of one of its columns.",
        )  # fmt: skip

    def opposite(self, kind: str) -> str:
        """Returns the modality that a query of this kind finds."""
        query = self.named(kind)
        others = [name for name in self.kinds if name != query]
        return min(others, key=lambda name: [*PREFERRED, self.kinds[name]].index(self.kinds[name]))

    def encode(self, texts: Sequence[str], who: str) -> Tensor:
        reader = cast("TextReader", self.source.readers[self.named("text")])
        return torch.cat([reader.encode(text, who) for text in texts])

    def unseen(self, text: str) -> list[str]:
        return cast("TextReader", self.source.readers[self.named("text")]).unseen(text)

    @property
    def pieces(self) -> str:
        """Units by which an unseen word is encoded."""
        return "word pieces" if "tokenizer" in self.source.options[self.named("text")] else "characters"

    def read_query(self, kind: str, file: str | Path | Image.Image) -> Read:
        """Reads a file of the user as the column of its kind is read."""
        reader = cast("FileReader", self.source.readers[self.named(kind)])
        return reader.read_file(_cell(file), kind if isinstance(file, Image.Image) else f"{kind} '{file}'")

    def read(self, picture: str | Path | Image.Image) -> Float[Tensor, "3 size size"]:
        return self.read_query("image", picture).values[0]

    def images(self, pictures: Tensor) -> Tensor:
        """Returns images as ``read`` has prepared them."""
        return pictures

    def thumbnail(self, picture: str | Path | Image.Image | dict[str, Any]) -> UInt8[Tensor, "side side 3"]:
        cell = picture if isinstance(picture, dict) else _cell(picture)
        pixels = read_image(cell, self.source.manifest.root, "image", size=THUMBNAIL)
        return (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()

    def fingerprint(self) -> bytes:
        """Digest of everything but the weights that the embeddings depend on: table, rows and files."""
        manifest = self.source.manifest
        digest = hashlib.sha256(f"{manifest.checksum()} {self.source.options}".encode() + self.rows.tobytes())
        for one in manifest.modalities.values():
            for cell in manifest.table[one.columns[0]][:] if one.kind not in ("text", "number") else ():
                name = cell.get("path") if isinstance(cell, dict) else cell
                with contextlib.suppress(OSError, ValueError):
                    state = (manifest.root / name).stat() if isinstance(name, str) else None
                    digest.update(f"{state and (state.st_size, state.st_mtime_ns)}".encode())
        return digest.digest()

    def vectors(self, model: DualEncoder) -> dict[str, Tensor]:
        """Embeds all rows: modality -> (row, dim)."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.kinds}
        for start in range(0, len(self.rows), BATCH):
            for name, reader in self.source.readers.items():
                parts[name].append(embed_batch(model, name, reader.read(self.rows[start : start + BATCH])))
        return {name: torch.cat(chunks) for name, chunks in parts.items()}

    @cached_property
    def _texts(self) -> list[Any] | None:
        texts = [name for name, kind in self.kinds.items() if kind == "text"]
        return self._cells(texts[0]) if texts else None

    def _cells(self, name: str) -> list[Any]:
        return self.source.manifest.table[self.source.manifest.modalities[name].columns[0]][:]

    def index(self, model: DualEncoder, kind: str, vectors: dict[str, Tensor], split: str | None = None) -> SearchIndex:
        """Returns the index of what a query of this kind finds: each file or text once.

        Args:
            model: the dual encoder.
            kind: kind of the queries.
            vectors: of ``vectors``.
            split: only rows of this split.
        """
        name = self.opposite(kind)
        cells, found = self._cells(name), self.kinds[name]
        allowed = set(self.rows.tolist() if split is None else self.source.rows[split].tolist())
        first: dict[Any, int] = {}
        rows: list[list[int]] = []
        places: list[int] = []
        for position, row in enumerate(self.rows.tolist()):
            if row in allowed and bool(vectors[name][position].any()):
                key = self._entry_name(cells[row], found, row)
                if first.setdefault(key, len(rows)) == len(rows):
                    rows.append([])
                    places.append(position)
                rows[first[key]].append(row)
        entries = [
            IndexEntry(key, keywords=self._captions(own) if found != "text" else (),
                       seen=any(row in self._training for row in own))
            for key, own in zip(first, rows, strict=True)
        ]  # fmt: skip
        if not entries:
            raise DataError("search", expected=f"rows of the split {split}", got="none")
        pictures = [one for one, own in self.kinds.items() if own == "image"]
        files = self._cells(pictures[0]) if pictures else None
        return SearchIndex(
            model, self, entries, vectors[name][torch.tensor(places)], found=FOUND.get(found, "entry"),
            picture=None if files is None else lambda index: self._shown(files[rows[index][0]]),
        )  # fmt: skip

    def _entry_name(self, cell: Any, kind: str, row: int) -> str:
        if isinstance(cell, dict):
            cell = cell.get("path")
        return cell.strip() if isinstance(cell, str) and cell.strip() else f"row {row}"

    def _captions(self, rows: Sequence[int]) -> tuple[str, ...]:
        texts = self._texts
        return tuple(dict.fromkeys(str(texts[row]) for row in rows))[:SHOWN] if texts is not None else ()

    def _shown(self, cell: Any) -> Tensor | None:
        # A search works without the file of a result that was found before.
        with contextlib.suppress(DataError):
            return self.thumbnail(cell)
        return None


def _cell(file: str | Path | Image.Image | bytes) -> Any:
    if isinstance(file, Image.Image):
        content = io.BytesIO()
        file.save(content, "PNG")
        return content.getvalue()
    return file if isinstance(file, bytes) else str(Path(file))
