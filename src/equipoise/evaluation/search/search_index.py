"""Pictures and captions in a shared space, and what lies nearest to a question."""

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
SHOWN = 96
"""Side of a picture of the user's own as it is shown, in pixels."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class IndexEntry(NamedTuple):
    """Something that can be found.

    Attributes:
        name: of the picture, or the caption itself.
        picture: (height, width, 3); None for a caption that belongs to several pictures or none.
        mark: the character, or "".
        keywords: what else it is called.
        seen: whether the model was trained on it; None for what is not of its data.
    """

    name: str
    picture: UInt8[Tensor, "height width 3"] | None = None
    mark: str = ""
    keywords: tuple[str, ...] = ()
    seen: bool | None = None


class SearchHit(NamedTuple):
    """An entry, its cosine with the question, and its rank: 1 + the number of those that are nearer."""

    rank: int
    score: float
    entry: IndexEntry


class SearchResult(NamedTuple):
    """What was found.

    Attributes:
        question: the text, or the name of the picture that was asked with.
        picture: of a question that is one.
        hits: nearest first; ties keep the order of the index.
        tied: how many more have the score of the last hit.
        unseen: words of the question that no caption of the training had; they are read by their letters.
        entries: how many there were to choose from.
    """

    question: str
    picture: UInt8[Tensor, "height width 3"] | None
    hits: list[SearchHit]
    tied: int
    unseen: list[str]
    entries: int


class SearchIndex:
    """Entries with their unit vectors.

    Args:
        space: in which they lie.
        source: the data set that the space was trained on; its words are the words of questions.
        entries: what can be found.
        vectors: (entry, dim), unit vectors.

    Raises:
        ConfigError: a data set without names and pictures.
    """

    def __init__(
        self, space: DualEncoder, source: Emoji, entries: Sequence[IndexEntry], vectors: Float[Tensor, "entry dim"]
    ) -> None:
        self.space, self.source, self.entries, self.vectors = space, source, list(entries), vectors

    def find(self, text: str, *, top: int = 10) -> SearchResult:
        """What lies nearest to a text.

        Raises:
            ShapeError: a text that is empty or too long. ConfigError: one of which nothing is known; top < 1.
        """
        ids = self.source.words.encode([text], "search")
        (query,) = embed_entries(self.space, "text", ids)
        return self._nearest(query, text, None, top, self.source.words.unseen(text))

    def like(self, picture: str | Path | Image.Image, *, top: int = 10) -> SearchResult:
        """What lies nearest to a picture.

        Raises:
            DataError: no picture, or one that ``data.pictures.read_picture`` refuses. ConfigError: top < 1.
        """
        (query,) = embed_entries(self.space, "image", self.source.images(self.source.read(picture)[None]))
        name = "a picture" if isinstance(picture, Image.Image) else Path(picture).name
        return self._nearest(query, name, load_square_image(picture, SHOWN), top, [])

    def _nearest(
        self, query: Tensor, question: str, picture: Tensor | None, top: int, unseen: list[str]
    ) -> SearchResult:
        if top < 1:
            raise ConfigError("search", expected="top >= 1", got=f"top = {top}")
        scores = similarities(self.vectors, query[None])[:, 0]
        order = scores.argsort(descending=True, stable=True)[:top].tolist()
        hits = [
            SearchHit(1 + int((scores > scores[place]).sum()), float(scores[place]), self.entries[place])
            for place in order
        ]
        last = scores[order[-1]]
        tied = int((scores == last).sum()) - sum(hit.score == float(last) for hit in hits)
        return SearchResult(question, picture, hits, tied, unseen, len(self.entries))


def image_entries(space: DualEncoder, source: Any, vectors: Tensor | None = None) -> SearchIndex:
    """All pictures of the data set, whatever split they are in; ``vectors`` where they are known already."""
    check_searchable(space, source)
    entries = [
        IndexEntry(item.name, picture, item.text, item.keywords, item.split == "train")
        for item, picture in zip(source.items, source.pictures, strict=True)
    ]
    if vectors is None:
        vectors = embed_entries(space, "image", source.images(source.pictures))
    return SearchIndex(space, source, entries, vectors)


def caption_entries(space: DualEncoder, source: Any, vectors: Tensor | None = None) -> SearchIndex:
    """All names and keywords of the data set, each once; a name has its picture."""
    check_searchable(space, source)
    entries = {
        item.name: IndexEntry(item.name, picture, item.text, item.keywords, item.split == "train")
        for item, picture in zip(source.items, source.pictures, strict=True)
    }
    for item in source.items:
        for keyword in item.keywords if item.split == "train" else ():
            entries.setdefault(keyword, IndexEntry(keyword, seen=True))
    if vectors is None:
        vectors = embed_entries(space, "text", source.words.encode(list(entries), "search"))
    return SearchIndex(space, source, list(entries.values()), vectors)


def index_folder(space: DualEncoder, source: Any, folder: Path) -> tuple[SearchIndex, list[str]]:
    """All pictures in a folder and below it, and why those were left out that could not be read.

    Raises:
        DataError: no such folder, or no picture in it.
    """
    check_searchable(space, source)
    if not folder.is_dir():
        raise DataError("search", expected="a folder of pictures", got=f"'{folder}', which is none")
    entries, made, troubles = [], [], []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
        try:
            made.append(source.read(path))
            entries.append(IndexEntry(str(path.relative_to(folder)), load_square_image(path, SHOWN)))
        except DataError as error:
            troubles.append(str(error))
    if not entries:
        got = f"none in '{folder}'" + (f"; the first of {len(troubles)} troubles: {troubles[0]}" if troubles else "")
        raise DataError("search", expected=f"pictures ({', '.join(sorted(SUFFIXES))})", got=got.rstrip("."))
    return SearchIndex(
        space, source, entries, embed_entries(space, "image", source.images(torch.stack(made)))
    ), troubles


def check_searchable(space: Any, source: Any) -> None:
    """Whether one can search with this model: it has pictures and words, and its data have names."""
    lacking = [name for name in ("image", "text") if name not in getattr(space, "names", ())]
    if lacking or not all(hasattr(source, part) for part in ("items", "pictures", "words")):
        raise ConfigError(
            "search", expected="a shared space of image and text, trained on data with names and pictures",
            got=f"{type(space).__name__} on {type(source).__name__}",
            fix="Train one: equipoise train --config emoji_clip.",
        )  # fmt: skip


def embed_entries(space: DualEncoder, name: str, inputs: Tensor) -> Float[Tensor, "sample dim"]:
    """Unit vectors of one modality, on the CPU."""
    place = next(space.parameters()).device
    with eval_mode_no_grad(space):
        parts = [space.embed({name: part.to(place)})[name].float().cpu() for part in inputs.split(BATCH)]
    return torch.cat(parts)
