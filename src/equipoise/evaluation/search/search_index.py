"""Nearest-neighbor search among images and captions embedded by a dual encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ...alignment import similarities
from ...data.image_augmentation import load_square_image
from ...errors import ConfigError, DataError
from ...nn.eval_mode import eval_mode_no_grad

if TYPE_CHECKING:
    from ...data.sets.emoji import Emoji
    from ...models.dual_encoder import DualEncoder

BATCH = 256
THUMBNAIL = 96
"""Side of the thumbnails of the user's images, in pixels."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class IndexEntry(NamedTuple):
    """An entry of the index.

    Attributes:
        name: name of the image, or the caption itself.
        image: (height, width, 3); None for a caption that belongs to no image or to several.
        mark: the emoji character, or "".
        keywords: other names.
        seen: whether the entry was in the training split; None for entries that are not from the data set.
    """

    name: str
    image: UInt8[Tensor, "height width 3"] | None = None
    mark: str = ""
    keywords: tuple[str, ...] = ()
    seen: bool | None = None


class SearchHit(NamedTuple):
    """An entry, its cosine similarity with the query, and its rank: 1 + the number of entries with a higher score."""

    rank: int
    score: float
    entry: IndexEntry


class SearchResult(NamedTuple):
    """Result of a search.

    Attributes:
        question: the query text, or the name of the query image.
        image: the query image, if the query is one.
        hits: entries in order of decreasing score; ties keep the order of the index.
        tied: number of further entries with the score of the last hit.
        unseen: words of the query that occur in no training caption; they are encoded by their letters.
        entries: number of entries in the index.
    """

    question: str
    image: UInt8[Tensor, "height width 3"] | None
    hits: list[SearchHit]
    tied: int
    unseen: list[str]
    entries: int


class SearchIndex:
    """Entries with their embeddings.

    Args:
        model: dual encoder of the embeddings.
        source: data set that the model was trained on; defines the vocabulary of queries.
        entries: entries that can be found.
        vectors: (entry, dim) unit vectors.
    """

    def __init__(
        self, model: DualEncoder, source: Emoji, entries: Sequence[IndexEntry], vectors: Float[Tensor, "entry dim"]
    ) -> None:
        self.model, self.source, self.entries, self.vectors = model, source, list(entries), vectors

    def search_by_text(self, text: str, *, top: int = 10) -> SearchResult:
        """Returns the entries nearest to a text.

        Raises:
            ShapeError: an empty or too long text. ConfigError: a text without known words or letters; top < 1.
        """
        ids = self.source.words.encode([text], "search")
        (query,) = embed_entries(self.model, "text", ids)
        return self._nearest(query, text, None, top, self.source.words.unseen(text))

    def search_by_image(self, image: str | Path | Image.Image, *, top: int = 10) -> SearchResult:
        """Returns the entries nearest to an image.

        Raises:
            DataError: a file that is not an image or cannot be loaded. ConfigError: top < 1.
        """
        (query,) = embed_entries(self.model, "image", self.source.images(self.source.read(image)[None]))
        name = "an image" if isinstance(image, Image.Image) else Path(image).name
        return self._nearest(query, name, load_square_image(image, THUMBNAIL), top, [])

    def _nearest(
        self, query: Tensor, question: str, image: Tensor | None, top: int, unseen: list[str]
    ) -> SearchResult:  # fmt: skip
        if top < 1:
            raise ConfigError("search", expected="top >= 1", got=f"top = {top}")
        scores = similarities(self.vectors, query[None])[:, 0]
        order = scores.argsort(descending=True, stable=True)[:top].tolist()
        hits = [
            SearchHit(1 + int((scores > scores[index]).sum()), float(scores[index]), self.entries[index])
            for index in order
        ]
        last = scores[order[-1]]
        tied = int((scores == last).sum()) - sum(hit.score == float(last) for hit in hits)
        return SearchResult(question, image, hits, tied, unseen, len(self.entries))


def image_entries(model: DualEncoder, source: Any, vectors: Tensor | None = None) -> SearchIndex:
    """Index of all images of the data set, in all splits; pass ``vectors`` if already computed."""
    check_searchable(model, source)
    entries = [
        IndexEntry(item.name, image, item.text, item.keywords, item.split == "train")
        for item, image in zip(source.items, source.pictures, strict=True)
    ]
    if vectors is None:
        vectors = embed_entries(model, "image", source.images(source.pictures))
    return SearchIndex(model, source, entries, vectors)


def caption_entries(model: DualEncoder, source: Any, vectors: Tensor | None = None) -> SearchIndex:
    """Index of all distinct names and training keywords of the data set; entries of names have an image."""
    check_searchable(model, source)
    entries = {
        item.name: IndexEntry(item.name, image, item.text, item.keywords, item.split == "train")
        for item, image in zip(source.items, source.pictures, strict=True)
    }
    for item in source.items:
        for keyword in item.keywords if item.split == "train" else ():
            entries.setdefault(keyword, IndexEntry(keyword, seen=True))
    if vectors is None:
        vectors = embed_entries(model, "text", source.words.encode(list(entries), "search"))
    return SearchIndex(model, source, list(entries.values()), vectors)


def index_folder(model: DualEncoder, source: Any, folder: Path) -> tuple[SearchIndex, list[str]]:
    """Index of all images in a folder and its subfolders, and the errors of files that could not be loaded.

    Raises:
        DataError: no such folder, or no image in it.
    """
    check_searchable(model, source)
    if not folder.is_dir():
        raise DataError("search", expected="a folder of images", got=f"'{folder}', which is not a folder")
    entries, images, errors = [], [], []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
        try:
            images.append(source.read(path))
            entries.append(IndexEntry(str(path.relative_to(folder)), load_square_image(path, THUMBNAIL)))
        except DataError as error:
            errors.append(str(error))
    if not entries:
        got = f"none in '{folder}'" + (f"; the first of {len(errors)} errors: {errors[0]}" if errors else "")
        raise DataError("search", expected=f"images ({', '.join(sorted(SUFFIXES))})", got=got.rstrip("."))
    vectors = embed_entries(model, "image", source.images(torch.stack(images)))
    return SearchIndex(model, source, entries, vectors), errors


def check_searchable(model: Any, source: Any) -> None:
    """Checks that the model embeds images and text and that its data set has names.

    Raises:
        ConfigError: it does not.
    """
    missing = [name for name in ("image", "text") if name not in getattr(model, "names", ())]
    if missing or not all(hasattr(source, attribute) for attribute in ("items", "pictures", "words")):
        raise ConfigError(
            "search", expected="a dual encoder of image and text, trained on data with names and images",
            got=f"{type(model).__name__} on {type(source).__name__}",
            fix="Train one: equipoise train --config emoji_clip.",
        )  # fmt: skip


def embed_entries(model: DualEncoder, name: str, inputs: Tensor) -> Float[Tensor, "sample dim"]:
    """Embeds inputs of one modality in batches; returns unit vectors on the CPU."""
    device = next(model.parameters()).device
    with eval_mode_no_grad(model):
        parts = [model.embed({name: part.to(device)})[name].float().cpu() for part in inputs.split(BATCH)]
    return torch.cat(parts)
