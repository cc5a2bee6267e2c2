"""`emoji`: pictures of the Noto Color Emoji font with their Unicode names and keywords, bundled with the package."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor

from ...errors import DataError
from ..counter_rng import CounterRNG
from ..dataset import Dataset, Split, split_statistics, standardize
from ..image_augmentation import color_jitter, load_square_image, random_translation
from .word_vocabulary import WordVocabulary, pad_sequences, split_words

ATLAS = Path(__file__).with_name("emoji.npz")
ATLAS_SHA256 = "e8d2bdff21f7e4cc036e7392c22e12b23200345f8f183e4d0575d247bf74d88f"
"""Of the file that scripts/make_emoji.py wrote."""
LENGTH = 24
"""Longest caption, in words."""
MOST_PIXELS, MOST_GAIN, MOST_TINT = 2, 0.05, 0.03
NAMED, EXTENDED = 0.6, 0.9
"""A training caption is the name below the first, the name and a keyword below the second, else a keyword alone."""
SPELLED = 0.1
"""Part of the words of training captions that are spelled, so that letters mean something too."""


class EmojiItem(NamedTuple):
    """One emoji.

    Attributes:
        text: the characters.
        name: as Unicode has it, the caption in evaluation.
        keywords: of the Unicode Common Locale Data Repository.
        parts: what the name is put together of; the name alone where it is not.
        family: of combinations; empty for single ones.
        split: "train", "val" or "test".
    """

    text: str
    name: str
    keywords: tuple[str, ...]
    parts: tuple[str, ...]
    family: str
    split: str


class Combinations(NamedTuple):
    """The samples of a split that are put together of parts, and these parts as a model gets them.

    Attributes:
        rows: (combination,) positions in the split.
        modality: which one the parts are inputs of.
        parts: (combination, part, ...) inputs, padded.
        present: (combination, part), False where a combination has fewer.
    """

    rows: Int[Tensor, " combination"]
    modality: str
    parts: Tensor
    present: Bool[Tensor, "combination part"]


class Emoji(Dataset):
    """3,395 emoji with their names; held-out combinations test whether a model puts meanings together.

    Inputs are "image" (3, 32, 32), the colors standardized, and "text" (24,), numbers of words padded with 0. The
    target is what a caption means: samples of one target show the same, so that no pair of them is a wrong one. Of each
    combination in the validation and test splits, such as "blue heart" or "woman running: dark skin tone", every part
    is in the training split with other parts. See docs/data/emoji.md.

    Raises:
        DataError: the bundled file is damaged.

    Example:
        >>> data = Emoji()
        >>> data.shapes, len(data.train), len(data.val), len(data.test)
        ({'image': (3, 32, 32), 'text': (24,)}, 2936, 183, 276)
        >>> data.items[0].name, data.words.encode(["grinning face"]).shape
        ('grinning face', torch.Size([1, 24]))
    """

    names = ("image", "text")
    task = "retrieval"

    def __init__(self) -> None:
        stored = _stored()
        self.pictures = torch.from_numpy(stored["palette"][stored["levels"]])
        self.items = _items(stored)
        self._rows = {
            which: torch.tensor([place for place, item in enumerate(self.items) if item.split == which])
            for which in ("train", "val", "test")
        }
        taught = self.split_items("train")
        self.words = WordVocabulary((said for item in taught for said in (item.name, *item.keywords)), length=LENGTH)
        self._colors = self.pictures[self._rows["train"]].float()
        self.white = float(standardize(torch.tensor(255.0), self._colors))
        meaning = _meanings(self.items, self.pictures)
        self.train, self.val, self.test = (self._split(which, meaning) for which in ("train", "val", "test"))
        self.num_outputs = int(meaning.max()) + 1
        self._keywords = self._meanings_of_keywords(taught)
        self.vocabulary = {"text": len(self.words)}
        self.noise = split_statistics({"image": self.train.inputs["image"]})

    def _meanings_of_keywords(self, taught: Sequence[EmojiItem]) -> dict[str, int]:
        """What a keyword alone means: what is named so, or else itself; all that are called so are partners."""
        names = [tuple(split_words(item.name)) for item in taught]
        named = dict(zip(names, self.train.target.tolist(), strict=True))
        spoken = {tuple(split_words(word)) for item in taught for word in item.keywords}
        new = {words: self.num_outputs + place for place, words in enumerate(sorted(spoken - set(named)))}
        meant = {**new, **named}
        return {word: meant[tuple(split_words(word))] for item in taught for word in item.keywords}

    def split_items(self, split: str) -> list[EmojiItem]:
        """What the samples of a split are."""
        return [self.items[place] for place in self._rows[split].tolist()]

    def images(self, pictures: UInt8[Tensor, "sample 32 32 3"]) -> Tensor:
        """(sample, 3, 32, 32): pictures as a model gets them."""
        return standardize(pictures.float(), self._colors).permute(0, 3, 1, 2).contiguous()

    def read(self, picture: str | Path | Image.Image) -> UInt8[Tensor, "32 32 3"]:
        """Any picture in the size of these; ``pictures.read_picture`` has what is refused."""
        return load_square_image(picture, self.pictures.shape[1])

    def combinations(self, split: str) -> Combinations:
        """The combinations of a split with their parts as texts of their own."""
        items = self.split_items(split)
        rows = [place for place, item in enumerate(items) if len(item.parts) > 1]
        most = max((len(items[place].parts) for place in rows), default=0)
        parts = torch.zeros(len(rows), most, LENGTH, dtype=torch.long)
        present = torch.zeros(len(rows), most, dtype=torch.bool)
        for number, place in enumerate(rows):
            own = items[place].parts
            parts[number, : len(own)] = self.words.encode(own)
            present[number, : len(own)] = True
        return Combinations(torch.tensor(rows, dtype=torch.long), "text", parts, present)

    def groups(self, split: str) -> list[str]:
        """The family of every sample of a split; "single" for what is put together of nothing."""
        return [item.family or "single" for item in self.split_items(split)]

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        if not train:
            return inputs
        image = color_jitter(inputs["image"], draw, gain=MOST_GAIN, tint=MOST_TINT)
        return {**inputs, "image": random_translation(image, draw, pixels=MOST_PIXELS, fill=self.white)}

    def batch(
        self, split: str, index: Int[Tensor, " batch"], *, seed: int, epoch: int, train: bool
    ) -> dict[str, Tensor]:
        made = super().batch(split, index, seed=seed, epoch=epoch, train=train)
        if not train:
            return made
        draw = CounterRNG(seed, epoch, index, split)
        items = [self.items[place] for place in self._rows[split][index].tolist()]
        text, meaning = self._captions(items, made["target"].tolist(), draw)
        return {**made, "text": text, "target": meaning}

    def _captions(self, items: Sequence[EmojiItem], meanings: Sequence[int], draw: CounterRNG) -> tuple[Tensor, Tensor]:
        """(batch, 24) what each is called this time, and (batch,) what that means."""
        dice, spelling = draw.uniform("caption", 2).tolist(), draw.uniform("spelling", LENGTH) < SPELLED
        texts, found = [], []
        for item, meaning, (kind, which) in zip(items, meanings, dice, strict=True):
            caption = item.name
            if item.keywords and kind >= NAMED:
                keyword = item.keywords[int(which * len(item.keywords))]
                alone = kind >= EXTENDED
                caption, meaning = (keyword, self._keywords[keyword]) if alone else (f"{caption} {keyword}", meaning)
            texts.append(caption)
            found.append(meaning)
        rows = [self._spelled(text, by_letter) for text, by_letter in zip(texts, spelling.tolist(), strict=True)]
        return pad_sequences(rows, LENGTH), torch.tensor(found)

    def _spelled(self, text: str, by_letter: Sequence[bool]) -> list[int]:
        row: list[int] = []
        for place, word in enumerate(split_words(text)):
            letters = place < LENGTH and by_letter[place]
            row += self.words.spelled(word) if letters else self.words.numbers(word)[0]
        return row

    def _split(self, which: str, meaning: Tensor) -> Split:
        rows = self._rows[which]
        captions = self.words.encode([self.items[place].name for place in rows.tolist()], f"emoji {which}")
        return Split({"image": self.images(self.pictures[rows]), "text": captions}, meaning[rows])


def _stored() -> dict[str, Any]:
    try:
        with open(ATLAS, "rb") as file, np.load(file) as stored:
            return dict(stored)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"emoji '{ATLAS.name}'", expected="the file that comes with the package", got=str(error),
            fix="Install equipoise again.",
        ) from error  # fmt: skip


def _items(stored: dict[str, Any]) -> list[EmojiItem]:
    splits = ("train", "val", "test")
    columns = (stored[name].tolist() for name in ("text", "name", "keywords", "parts", "family", "split"))
    rows = list(zip(*columns, strict=True))
    # A keyword such as "?" has no word in it, and one that is a name held out would be learned after all.
    refused = {(), *(tuple(split_words(name)) for _, name, _, _, _, which in rows if which)}
    return [
        EmojiItem(
            text, name, tuple(word for word in keywords.split("|") if tuple(split_words(word)) not in refused),
            tuple(parts.split("|")), family, splits[which],
        )
        for text, name, keywords, parts, family, which in rows
    ]  # fmt: skip


def _meanings(items: Sequence[EmojiItem], pictures: Tensor) -> Int[Tensor, " sample"]:
    """The same number for the same picture, and for names of the same words, such as "keycap: #" and "keycap: *"."""
    numbers: dict[Any, int] = {}
    found = []
    for item, picture in zip(items, pictures, strict=True):
        shown, said = picture.numpy().tobytes(), tuple(split_words(item.name))
        number = numbers.get(shown, numbers.get(said, len(found)))
        numbers[shown] = numbers[said] = number
        found.append(number)
    return torch.unique(torch.tensor(found), return_inverse=True)[1]
