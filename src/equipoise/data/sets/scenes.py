"""`scenes`: rendered shapes and vehicles with captions, questions, and the patches that each word refers to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ...alignment.losses.image_text_matching import IGNORED
from ...errors import ConfigError, unknown_name
from ..augmentation import add_noise
from ..counter_rng import CounterRNG
from ..dataset import Dataset, Split
from .scene_questions import KINDS, Question, SceneSampler, placed_objects
from .scene_rendering import SceneObject, patches_of, render_scene
from .text_codes import END, IDS, IMAGE, PAD, WORDS

SIZE, PATCH = 48, 8
LONGEST = 14
"""Length of the longest text in words, with the image token and the end token."""
GROUND = (222, 250)
"""Range of the background's brightness."""


@dataclass(frozen=True)
class Level:
    """Difficulty of the images.

    Attributes:
        most: largest number of objects in an image.
        sides: possible sides of an object, in pixels.
        step: positions are multiples of it, in pixels; with ``PATCH`` objects are aligned to the patches.
        overlap: largest fraction of an object's square that another one may cover.
        noise: standard deviation of the noise on standardized pixels.
        kinds: kinds of samples, in turn.
    """

    most: int
    sides: tuple[int, ...]
    step: int
    overlap: float
    noise: float
    kinds: tuple[str, ...]


ALL = ("caption", *KINDS)
"""Captions occur twice as often as each kind of question."""
LEVELS = {
    1: Level(2, (16,), 8, 0.0, 0.1, tuple(kind for kind in ALL if kind not in ("count", "relation"))),
    2: Level(3, (16, 24), 8, 0.0, 0.2, ALL),
    3: Level(3, tuple(range(12, 25)), 1, 0.3, 0.5, ALL),
}


@dataclass(frozen=True, eq=False)
class RenderedSplit:
    """The rendered samples of a split.

    Attributes:
        pictures: (sample, 3, 48, 48) images.
        text, labels: (sample, word) ids; labels are -100 where nothing is predicted.
        regions: (sample, word, patch) True for the patches of the objects that a word refers to.
        covered: (sample, patch) True for the patches of all objects.
        kinds: kind of each sample.
        new: (sample,) True if the object in question has a held-out combination.
        things: objects of each image.
    """

    pictures: UInt8[Tensor, "sample 3 size size"]
    text: Int[Tensor, "sample word"]
    labels: Int[Tensor, "sample word"]
    regions: Bool[Tensor, "sample word patch"]
    covered: Bool[Tensor, "sample patch"]
    kinds: tuple[str, ...]
    new: Bool[Tensor, " sample"]
    things: tuple[tuple[SceneObject, ...], ...]


class Scenes(Dataset):
    """Images (3, 48, 48) of one to three colored objects, each with a question and its answer, or with a caption.

    A text is ``<image> what color is the car | red`` or ``<image> describe | a red car and a blue truck <end>``; the
    model predicts the part after the bar. Eight combinations, one color of each shape, occur in the test split
    only, where every second sample is about one of them. See docs/data/scenes.md.

    Args:
        level: 1: one or two objects of one size, aligned to the patches; 2: up to three in two sizes, also with
            questions on counts and relations; 3: any sizes and positions, with overlap and more noise.
        samples: size of the training split; validation has 1/16 and test 1/8 of it.
        seed: seed of all random numbers.

    Raises:
        ConfigError: an unknown level, or fewer than 128 samples.

    Example:
        >>> data = Scenes(samples=128)
        >>> data.shapes["image"], len(data.train), len(data.val), len(data.test)
        ((3, 48, 48), 128, 8, 16)
        >>> data.things("train", 4)[0].color, data.words("train", 4)[-2:]
        ('green', ['circle', 'no'])
    """

    names = ("image", "text")
    task = "language"
    num_outputs = len(WORDS)
    patch, lexicon = PATCH, WORDS
    vocabulary = {"text": len(WORDS)}  # noqa: RUF012

    def __init__(self, *, level: int = 2, samples: int = 12_000, seed: int = 0) -> None:
        if level not in LEVELS:
            raise unknown_name("Scenes", "level", str(level), map(str, LEVELS))
        if samples < 128:
            raise ConfigError("Scenes", expected="samples >= 128", got=f"samples = {samples}")
        self.level = level
        sizes = {"train": samples, "val": samples // 16, "test": samples // 8}
        self._rendered = {split: render_split(split, size, level, seed) for split, size in sizes.items()}
        pixels = self._rendered["train"].pictures.float() / 255
        self._mean, self._deviation = pixels.mean().item(), pixels.std(correction=0).item()
        self.train, self.val, self.test = (
            Split({"image": part.pictures, "text": part.text, "labels": part.labels}, _answers(part))
            for part in self._rendered.values()
        )
        self.noise = {"image": (0.0, 1.0)}

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        pictures = self.standardized(inputs["image"])
        return {**inputs, "image": add_noise(pictures, LEVELS[self.level].noise, draw, "image")}

    def standardized(self, pictures: UInt8[Tensor, "*lead 3 size size"]) -> Float[Tensor, "*lead 3 size size"]:
        """Standardizes pixels from 0 to 255 with the mean and standard deviation of the training images."""
        return (pictures.float() / 255 - self._mean) / self._deviation

    def kinds(self, split: str) -> tuple[str, ...]:
        """Returns the kind of each sample: "caption", or the type of its question."""
        return self._part(split).kinds

    def new(self, split: str) -> Bool[Tensor, " sample"]:
        """Returns True for samples about a held-out combination, which only the test split has."""
        return self._part(split).new

    def regions(self, split: str, index: Int[Tensor, " batch"]) -> Bool[Tensor, "batch word patch"]:
        """Returns the patches of the objects that each word refers to, row by row; all False for other words."""
        return self._part(split).regions[index]

    def covered(self, split: str, index: Int[Tensor, " batch"]) -> Bool[Tensor, "batch patch"]:
        """Returns the patches that contain any object."""
        return self._part(split).covered[index]

    def things(self, split: str, index: int) -> tuple[SceneObject, ...]:
        """Returns the objects in the image of a sample."""
        return self._part(split).things[index]

    def words(self, split: str, index: int) -> list[str]:
        """Returns the words of a sample, without padding."""
        return [WORDS[number] for number in self._part(split).text[index].tolist() if WORDS[number] != PAD]

    def _part(self, split: str) -> RenderedSplit:
        self.split(split)
        return self._rendered[split]


@lru_cache(maxsize=6)
def render_split(split: str, count: int, level: int, seed: int) -> RenderedSplit:
    """Renders a split; a sample is a function of seed, split, level and index alone."""
    kinds = tuple(LEVELS[level].kinds[position % len(LEVELS[level].kinds)] for position in range(count))
    rows = [_sample(split, position, kind, level, seed) for position, kind in enumerate(kinds)]
    pictures, text, labels, regions, covered, new, things = zip(*rows, strict=True)
    return RenderedSplit(
        torch.from_numpy(np.stack(pictures)), torch.tensor(text), torch.tensor(labels),
        torch.from_numpy(np.stack(regions)), torch.from_numpy(np.stack(covered)), kinds, torch.tensor(new), things,
    )  # fmt: skip


def _sample(split: str, position: int, kind: str, level: int, seed: int) -> tuple:
    chosen = LEVELS[level]
    rng = np.random.default_rng((seed, ("train", "val", "test").index(split), level, position))
    new = split == "test" and bool(rng.integers(2))
    question = KINDS[kind](SceneSampler(rng, chosen.most, new))
    question = placed_objects(question, rng, size=SIZE, sides=chosen.sides, step=chosen.step, overlap=chosen.overlap)
    light = int(rng.integers(*GROUND))
    picture, owner = render_scene(question.things, SIZE, (light, light, light - 4))
    text, labels = format_samples(question, kind)
    covered = patches_of(owner, range(len(question.things)), PATCH)
    return picture, text, labels, regions_of(question, owner), covered, new, question.things


def format_samples(sample: Question, kind: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a text and its labels, both padded to ``LONGEST``; captions end with the end token.

    Example:
        >>> question = Question((), (("what", ()), ("is", ()), ("red", (0,))), (("car", (0,)),))
        >>> [WORDS[number] for number in format_samples(question, "object")[0][:6]]
        ['<image>', 'what', 'is', 'red', 'car', '<pad>']
    """
    question = [IDS[IMAGE], *(IDS[word] for word, _ in sample.question)]
    answer = [*(IDS[word] for word, _ in sample.answer), *([IDS[END]] if kind == "caption" else [])]
    rest = LONGEST - len(question) - len(answer)
    return question + answer + [IDS[PAD]] * rest, [IGNORED] * len(question) + answer + [IGNORED] * rest


def regions_of(question: Question, owner: Int[np.ndarray, "size size"]) -> Bool[np.ndarray, "word patch"]:
    """Returns the patches of the objects that each word of ``format_samples`` refers to."""
    regions = np.zeros((LONGEST, (SIZE // PATCH) ** 2), dtype=bool)
    for position, (_, things) in enumerate((*question.question, *question.answer), start=1):
        if things:
            regions[position] = patches_of(owner, things, PATCH)
    return regions


def _answers(part: RenderedSplit) -> Int[Tensor, " sample"]:
    answers = part.labels.max(dim=1).values
    return answers.masked_fill(torch.tensor([kind == "caption" for kind in part.kinds]), IGNORED)
