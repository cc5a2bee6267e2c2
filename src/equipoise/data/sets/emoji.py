"""`emoji`: images of the Noto Color Emoji font with their Unicode names and keywords, bundled with the package."""

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
"""Checksum of the file written by scripts/make_emoji.py."""
LENGTH = 24
"""Longest caption, in words."""
MOST_PIXELS, MOST_GAIN, MOST_TINT = 2, 0.05, 0.03
NAMED, EXTENDED = 0.6, 0.9
"""Thresholds of a uniform number: the name below the first, name and keyword below the second, else a keyword alone."""
SPELLED = 0.1
"""Probability that a word of a training caption is encoded by its trigrams, so that trigrams are trained too."""


class EmojiItem(NamedTuple):
    """One emoji.

    Attributes:
        text: characters.
        name: Unicode name, the caption in evaluation.
        keywords: from the Unicode Common Locale Data Repository.
        parts: components of a combined name; the name alone if it is not combined.
        family: kind of combination; empty if the name is not combined.
        split: "train", "val" or "test".
    """

    text: str
    name: str
    keywords: tuple[str, ...]
    parts: tuple[str, ...]
    family: str
    split: str


class Combinations(NamedTuple):
    """Combined emoji of a split, and their components as model inputs.

    Attributes:
        rows: (combination,) positions in the split.
        modality: modality of the components.
        parts: (combination, part, ...) padded inputs.
        present: (combination, part) bool, False at padding.
    """

    rows: Int[Tensor, " combination"]
    modality: str
    parts: Tensor
    present: Bool[Tensor, "combination part"]


class Emoji(Dataset):
    """3,395 emoji with their names; held-out combinations test compositional generalization.

    Inputs are "image" (3, 32, 32), standardized colors, and "text" (24,), word ids padded with 0. The target
    identifies the target of a caption: samples with equal targets are positives of each other. Every component of the
    combinations in the validation and test splits, such as "blue heart" or "woman running: dark skin tone", occurs in
    the training split with other components. See docs/data/emoji.md.

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
            which: torch.tensor([index for index, item in enumerate(self.items) if item.split == which])
            for which in ("train", "val", "test")
        }
        train_items = self.split_items("train")
        self.words = WordVocabulary(
            (caption for item in train_items for caption in (item.name, *item.keywords)), length=LENGTH
        )
        self._colors = self.pictures[self._rows["train"]].float()
        self.white = float(standardize(torch.tensor(255.0), self._colors))
        target = _targets(self.items, self.pictures)
        self.train, self.val, self.test = (self._split(which, target) for which in ("train", "val", "test"))
        self.num_outputs = int(target.max()) + 1
        self._keywords = self._keyword_targets(train_items)
        self.vocabulary = {"text": len(self.words)}
        self.noise = split_statistics({"image": self.train.inputs["image"]})

    def _keyword_targets(self, train_items: Sequence[EmojiItem]) -> dict[str, int]:
        """Returns {keyword: target}: that of the emoji with this name, or else a new one shared by its emoji."""
        names = [tuple(split_words(item.name)) for item in train_items]
        targets = dict(zip(names, self.train.target.tolist(), strict=True))
        keyword_words = {tuple(split_words(word)) for item in train_items for word in item.keywords}
        new = {words: self.num_outputs + index for index, words in enumerate(sorted(keyword_words - set(targets)))}
        target_of = {**new, **targets}
        return {word: target_of[tuple(split_words(word))] for item in train_items for word in item.keywords}

    def split_items(self, split: str) -> list[EmojiItem]:
        """Returns the emoji of a split."""
        return [self.items[index] for index in self._rows[split].tolist()]

    def images(self, pictures: UInt8[Tensor, "sample 32 32 3"]) -> Tensor:
        """Standardizes images, returns (sample, 3, 32, 32)."""
        return standardize(pictures.float(), self._colors).permute(0, 3, 1, 2).contiguous()

    def read(self, picture: str | Path | Image.Image) -> UInt8[Tensor, "32 32 3"]:
        """Loads any image in the size of this data set; errors as ``load_square_image``."""
        return load_square_image(picture, self.pictures.shape[1])

    def combinations(self, split: str) -> Combinations:
        """Returns the combined emoji of a split, with their components as separate texts."""
        items = self.split_items(split)
        rows = [index for index, item in enumerate(items) if len(item.parts) > 1]
        most = max((len(items[index].parts) for index in rows), default=0)
        parts = torch.zeros(len(rows), most, LENGTH, dtype=torch.long)
        present = torch.zeros(len(rows), most, dtype=torch.bool)
        for number, index in enumerate(rows):
            own = items[index].parts
            parts[number, : len(own)] = self.words.encode(own)
            present[number, : len(own)] = True
        return Combinations(torch.tensor(rows, dtype=torch.long), "text", parts, present)

    def groups(self, split: str) -> list[str]:
        """Returns the family of every sample of a split; "single" if its name is not combined."""
        return [item.family or "single" for item in self.split_items(split)]

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        if not train:
            return inputs
        image = color_jitter(inputs["image"], draw, gain=MOST_GAIN, tint=MOST_TINT)
        return {**inputs, "image": random_translation(image, draw, pixels=MOST_PIXELS, fill=self.white)}

    def batch(
        self, split: str, index: Int[Tensor, " batch"], *, seed: int, epoch: int, train: bool
    ) -> dict[str, Tensor]:
        batch = super().batch(split, index, seed=seed, epoch=epoch, train=train)
        if not train:
            return batch
        draw = CounterRNG(seed, epoch, index, split)
        items = [self.items[index] for index in self._rows[split][index].tolist()]
        captions, targets = self._captions(items, batch["target"].tolist(), draw)
        return {**batch, "text": self._encoded(captions, draw), "target": torch.tensor(targets)}

    def _captions(
        self, items: Sequence[EmojiItem], targets: Sequence[int], draw: CounterRNG
    ) -> tuple[list[str], list[int]]:
        """Draws captions; returns them and their targets."""
        texts, caption_targets = [], []
        for item, target, (kind, which) in zip(items, targets, draw.uniform("caption", 2).tolist(), strict=True):
            caption = item.name
            if item.keywords and kind >= NAMED:
                keyword = item.keywords[int(which * len(item.keywords))]
                alone = kind >= EXTENDED
                caption, target = (keyword, self._keywords[keyword]) if alone else (f"{caption} {keyword}", target)
            texts.append(caption)
            caption_targets.append(target)
        return texts, caption_targets

    def _encoded(self, captions: Sequence[str], draw: CounterRNG) -> Tensor:
        """Returns the inputs of training captions: ids (batch, 24), with some words spelled."""
        spelling = draw.uniform("spelling", LENGTH) < SPELLED
        rows = [self._spelled(text, by_letter) for text, by_letter in zip(captions, spelling.tolist(), strict=True)]
        return pad_sequences(rows, LENGTH)

    def _spelled(self, text: str, by_letter: Sequence[bool]) -> list[int]:
        row: list[int] = []
        for index, word in enumerate(split_words(text)):
            letters = index < LENGTH and by_letter[index]
            row += self.words.spelled(word) if letters else self.words.numbers(word)[0]
        return row

    def _split(self, which: str, target: Tensor) -> Split:
        rows = self._rows[which]
        captions = self.words.encode([self.items[index].name for index in rows.tolist()], f"emoji {which}")
        return Split({"image": self.images(self.pictures[rows]), "text": captions}, target[rows])


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
    # Drop keywords without words, such as "?", and those that equal held-out names: they would leak into training.
    refused = {(), *(tuple(split_words(name)) for _, name, _, _, _, which in rows if which)}
    return [
        EmojiItem(
            text, name, tuple(word for word in keywords.split("|") if tuple(split_words(word)) not in refused),
            tuple(parts.split("|")), family, splits[which],
        )
        for text, name, keywords, parts, family, which in rows
    ]  # fmt: skip


def _targets(items: Sequence[EmojiItem], pictures: Tensor) -> Int[Tensor, " sample"]:
    """Returns targets, equal for equal images and for names of equal words, such as "keycap: #" and "keycap: *"."""
    numbers: dict[Any, int] = {}
    result = []
    for item, picture in zip(items, pictures, strict=True):
        pixels, words = picture.numpy().tobytes(), tuple(split_words(item.name))
        number = numbers.get(pixels, numbers.get(words, len(result)))
        numbers[pixels] = numbers[words] = number
        result.append(number)
    return torch.unique(torch.tensor(result), return_inverse=True)[1]
