"""Nearest-neighbor search among images and captions embedded by a dual encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    from ...data.tables.modality_readers import Read
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
        unseen: words of the query that occur in no training caption; they are encoded by their letters or word pieces.
        entries: number of entries in the index.
        found: what an entry is: "image", "caption", "recording" or "entry"; "" if it is not known.
        pieces: what unseen words are encoded by.
    """

    question: str
    image: UInt8[Tensor, "height width 3"] | None
    hits: list[SearchHit]
    tied: int
    unseen: list[str]
    entries: int
    found: str = ""
    pieces: str = "characters"


class SearchIndex:
    """Entries with their embeddings.

    Args:
        model: dual encoder of the embeddings.
        source: data that the model was trained on, such as ``Emoji``, or a ``TableGallery``; defines the vocabulary of
            queries, and how files are read.
        entries: entries that can be found.
        vectors: (entry, dim) unit vectors.
        found: what an entry is.
        picture: returns the image of the entry at a place in the index, for entries without one.
    """

    def __init__(
        self, model: DualEncoder, source: Any, entries: Sequence[IndexEntry],
        vectors: Float[Tensor, "entry dim"], *, found: str = "",
        picture: Callable[[int], Tensor | None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.source, self.entries, self.vectors = model, source, list(entries), vectors
        self.found, self.picture = found, picture

    def search_by_text(self, text: str, *, top: int = 10) -> SearchResult:
        """Returns the entries nearest to a text.

        Raises:
            ShapeError: an empty or too long text. ConfigError: a text without known words or letters; top < 1.
        """
        ids = self.source.words.encode([text], "search")
        (query,) = embed_entries(self.model, modality_of(self.source, "text"), ids)
        return self._nearest(query, text, None, top, self.source.words.unseen(text))

    def search_by_image(self, image: str | Path | Image.Image, *, top: int = 10) -> SearchResult:
        """Returns the entries nearest to an image.

        Raises:
            DataError: a file that is not an image or cannot be loaded. ConfigError: top < 1.
        """
        pixels = self.source.images(self.source.read(image)[None])
        (query,) = embed_entries(self.model, modality_of(self.source, "image"), pixels)
        name = "an image" if isinstance(image, Image.Image) else Path(image).name
        return self._nearest(query, name, _thumbnail(self.source, image), top, [])

    def search_by_audio(self, recording: str | Path, *, top: int = 10) -> SearchResult:
        """Returns the entries nearest to a recording, for models of tables with audio.

        Raises:
            DataError: a file that is not a recording or cannot be loaded. ConfigError: a model without audio; top < 1.
        """
        if not hasattr(self.source, "read_query"):
            raise ConfigError("search", expected="a model with audio", got="one of images and captions")
        read = self.source.read_query("audio", recording)
        (query,) = embed_batch(self.model, modality_of(self.source, "audio"), read)
        return self._nearest(query, Path(recording).name, None, top, [])

    def _nearest(
        self, query: Tensor, question: str, image: Tensor | None, top: int, unseen: list[str]
    ) -> SearchResult:  # fmt: skip
        if top < 1:
            raise ConfigError("search", expected="top >= 1", got=f"top = {top}")
        scores = similarities(self.vectors, query[None])[:, 0]
        order = scores.argsort(descending=True, stable=True)[:top].tolist()
        hits = [
            SearchHit(1 + int((scores > scores[index]).sum()), float(scores[index]), self._entry(index))
            for index in order
        ]
        last = scores[order[-1]]
        tied = int((scores == last).sum()) - sum(hit.score == float(last) for hit in hits)
        pieces = getattr(self.source, "pieces", "characters") if unseen else "characters"
        return SearchResult(question, image, hits, tied, unseen, len(self.entries), self.found, pieces)

    def _entry(self, index: int) -> IndexEntry:
        entry = self.entries[index]
        return entry if entry.image is not None or self.picture is None else entry._replace(image=self.picture(index))


def image_entries(model: DualEncoder, source: Any, vectors: Tensor | None = None) -> SearchIndex:
    """Index of all images of the data set, in all splits; pass ``vectors`` if already computed."""
    check_searchable(model, source)
    entries = [
        IndexEntry(item.name, image, item.text, item.keywords, item.split == "train")
        for item, image in zip(source.items, source.pictures, strict=True)
    ]
    if vectors is None:
        vectors = embed_entries(model, "image", source.images(source.pictures))
    return SearchIndex(model, source, entries, vectors, found="image")


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
    return SearchIndex(model, source, list(entries.values()), vectors, found="caption")


def index_folder(model: DualEncoder, source: Any, folder: Path) -> tuple[SearchIndex, list[str]]:
    """Index of all images in a folder and its subfolders, and the errors of files that could not be loaded.

    Raises:
        DataError: no such folder, or no image in it.
    """
    check_searchable(model, source)
    name = modality_of(source, "image")
    if not folder.is_dir():
        raise DataError("search", expected="a folder of images", got=f"'{folder}', which is not a folder")
    names, images, vectors, errors = [], [], [], []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
        try:
            images.append(source.read(path))
            names.append(str(path.relative_to(folder)))
        except DataError as error:
            errors.append(str(error))
        if len(images) == BATCH:
            vectors.append(embed_entries(model, name, source.images(torch.stack(images))))
            images = []
    if not names:
        got = f"none in '{folder}'" + (f"; the first of {len(errors)} errors: {errors[0]}" if errors else "")
        raise DataError("search", expected=f"images ({', '.join(sorted(SUFFIXES))})", got=got.rstrip("."))
    if images:
        vectors.append(embed_entries(model, name, source.images(torch.stack(images))))
    entries = [IndexEntry(name) for name in names]
    return SearchIndex(
        model,
        source,
        entries,
        torch.cat(vectors),
        found="image",
        picture=lambda index: _thumbnail(source, folder / names[index]),
    ), errors


def modality_of(source: Any, kind: str) -> str:
    """Returns the modality of the model for a kind of query: the kind itself, or the column of a table."""
    return source.named(kind) if hasattr(source, "named") else kind


def _thumbnail(source: Any, image: str | Path | Image.Image) -> UInt8[Tensor, "side side 3"]:
    return source.thumbnail(image) if hasattr(source, "thumbnail") else load_square_image(image, THUMBNAIL)


def check_searchable(model: Any, source: Any) -> None:
    """Checks that the model embeds images and text and that its data set has names, or is a gallery of a table.

    Raises:
        ConfigError: it does not.
    """
    if hasattr(source, "named") and hasattr(model, "embed"):
        return
    missing = [name for name in ("image", "text") if name not in getattr(model, "names", ())]
    if missing or not all(hasattr(source, attribute) for attribute in ("items", "pictures", "words")):
        raise ConfigError(
            "search", expected="a dual encoder of image and text, trained on data with names and images",
            got=f"{type(model).__name__} on {type(source).__name__}",
            fix="Train one: equipoise train --config emoji_clip, or with your own table: --data TABLE --pair "
                "image,text.",
        )  # fmt: skip


def embed_entries(model: DualEncoder, name: str, inputs: Tensor) -> Float[Tensor, "sample dim"]:
    """Embeds inputs of one modality in batches; returns unit vectors on the CPU."""
    device = next(model.parameters()).device
    with eval_mode_no_grad(model):
        parts = [model.embed({name: part.to(device)})[name].float().cpu() for part in inputs.split(BATCH)]
    return torch.cat(parts)


def embed_batch(model: DualEncoder, name: str, read: Read) -> Float[Tensor, "sample dim"]:
    """Embeds what a reader of a table has read; returns unit vectors on the CPU, zeros for missing samples."""
    device = next(model.parameters()).device
    batch: dict[str, Any] = {name: read.values.to(device)}
    batch |= {
        key: {name: part.to(device)} for key, part in (("mask", read.mask), ("times", read.times)) if part is not None
    }
    with eval_mode_no_grad(model):
        return model.embed(batch)[name].float().cpu()
