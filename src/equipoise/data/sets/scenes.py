"""`scenes`: pictures of colored shapes and vehicles with captions, questions and the true patches of every word."""

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
"""Words of the longest text, the picture's place and the end included."""
GROUND = (222, 250)
"""Darkest and lightest ground."""


@dataclass(frozen=True)
class Level:
    """How hard the pictures are.

    Attributes:
        most: things in a picture.
        sides: of the things' squares, in pixels.
        step: things stand at multiples of it, in pixels; at ``PATCH`` a thing meets all patches alike wherever it is.
        overlap: part of a thing's square that another one may cover.
        noise: standard deviation of the pixels' noise, that of the pixels being 1.
        kinds: what the samples are, in turn.
    """

    most: int
    sides: tuple[int, ...]
    step: int
    overlap: float
    noise: float
    kinds: tuple[str, ...]


ALL = ("caption", *KINDS)
"""A caption twice as often as a question of any kind."""
LEVELS = {
    1: Level(2, (16,), 8, 0.0, 0.1, tuple(kind for kind in ALL if kind not in ("count", "relation"))),
    2: Level(3, (16, 24), 8, 0.0, 0.2, ALL),
    3: Level(3, tuple(range(12, 25)), 1, 0.3, 0.5, ALL),
}


@dataclass(frozen=True, eq=False)
class RenderedSplit:
    """The samples of a split, as they are drawn and written.

    Attributes:
        pictures: (sample, 3, 48, 48).
        text, labels: (sample, word) ids; what is predicted, and -100.
        regions: (sample, word, patch) True where a thing is that the word speaks of.
        covered: (sample, patch) True where any thing is.
        kinds: of the samples.
        new: (sample,) True where what is asked about has a held-out combination.
        things: of the pictures.
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
    """Pictures (3, 48, 48) of one to three colored things, each with a question and its answer, or with a caption.

    A text is ``<image> what color is the car | red`` or ``<image> describe | a red car and a blue truck <end>``; what
    stands behind the bar is to be predicted. Eight combinations, one color of each shape, are in the test split
    alone, where every second sample asks about one of them. See docs/data/scenes.md.

    Args:
        level: 1: one or two things of one size, in line with the patches; 2: up to three, small and large, counted and
            put in relation; 3: of any size anywhere, with overlap and more noise.
        samples: of the training split; validation has a sixteenth of them, the test an eighth.
        seed: of everything that is drawn.

    Raises:
        ConfigError: an unknown level, fewer than 128 samples.

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
        self._made = {split: render_split(split, size, level, seed) for split, size in sizes.items()}
        pixels = self._made["train"].pictures.float() / 255
        self._mean, self._deviation = pixels.mean().item(), pixels.std(correction=0).item()
        self.train, self.val, self.test = (
            Split({"image": part.pictures, "text": part.text, "labels": part.labels}, _answers(part))
            for part in self._made.values()
        )
        self.noise = {"image": (0.0, 1.0)}

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        pictures = self.standardized(inputs["image"])
        return {**inputs, "image": add_noise(pictures, LEVELS[self.level].noise, draw, "image")}

    def standardized(self, pictures: UInt8[Tensor, "*lead 3 size size"]) -> Float[Tensor, "*lead 3 size size"]:
        """Pixels from 0 to 255 as a model gets them: 0 is the mean of the training pictures, 1 a deviation from it."""
        return (pictures.float() / 255 - self._mean) / self._deviation

    def kinds(self, split: str) -> tuple[str, ...]:
        """What each sample is: "caption", or the type of its question."""
        return self._part(split).kinds

    def new(self, split: str) -> Bool[Tensor, " sample"]:
        """True for the samples that ask about a held-out combination; all are False outside the test split."""
        return self._part(split).new

    def regions(self, split: str, index: Int[Tensor, " batch"]) -> Bool[Tensor, "batch word patch"]:
        """The true patches of every word, row by row from the upper left; none for a word that names no thing there."""
        return self._part(split).regions[index]

    def covered(self, split: str, index: Int[Tensor, " batch"]) -> Bool[Tensor, "batch patch"]:
        """The patches where any thing is."""
        return self._part(split).covered[index]

    def things(self, split: str, index: int) -> tuple[SceneObject, ...]:
        """What the picture of a sample shows."""
        return self._part(split).things[index]

    def words(self, split: str, index: int) -> list[str]:
        """The text of a sample, padding left out."""
        return [WORDS[number] for number in self._part(split).text[index].tolist() if WORDS[number] != PAD]

    def _part(self, split: str) -> RenderedSplit:
        self.split(split)
        return self._made[split]


@lru_cache(maxsize=6)
def render_split(split: str, count: int, level: int, seed: int) -> RenderedSplit:
    """The samples of a split, each a function of the seed, the split, the level and its position alone."""
    kinds = tuple(LEVELS[level].kinds[place % len(LEVELS[level].kinds)] for place in range(count))
    rows = [_sample(split, place, kind, level, seed) for place, kind in enumerate(kinds)]
    pictures, text, labels, regions, covered, new, things = zip(*rows, strict=True)
    return RenderedSplit(
        torch.from_numpy(np.stack(pictures)), torch.tensor(text), torch.tensor(labels),
        torch.from_numpy(np.stack(regions)), torch.from_numpy(np.stack(covered)), kinds, torch.tensor(new), things,
    )  # fmt: skip


def _sample(split: str, place: int, kind: str, level: int, seed: int) -> tuple:
    chosen = LEVELS[level]
    rng = np.random.default_rng((seed, ("train", "val", "test").index(split), level, place))
    new = split == "test" and bool(rng.integers(2))
    asked = KINDS[kind](SceneSampler(rng, chosen.most, new))
    asked = placed_objects(asked, rng, size=SIZE, sides=chosen.sides, step=chosen.step, overlap=chosen.overlap)
    light = int(rng.integers(*GROUND))
    picture, owner = render_scene(asked.things, SIZE, (light, light, light - 4))
    text, labels = format_samples(asked, kind)
    covered = patches_of(owner, range(len(asked.things)), PATCH)
    return picture, text, labels, regions_of(asked, owner), covered, new, asked.things


def format_samples(asked: Question, kind: str) -> tuple[list[int], list[int]]:
    """The ids of a text and its labels, both padded to ``LONGEST``; a caption has to find its end too.

    Example:
        >>> asked = Question((), (("what", ()), ("is", ()), ("red", (0,))), (("car", (0,)),))
        >>> [WORDS[number] for number in format_samples(asked, "object")[0][:6]]
        ['<image>', 'what', 'is', 'red', 'car', '<pad>']
    """
    question = [IDS[IMAGE], *(IDS[word] for word, _ in asked.question)]
    answer = [*(IDS[word] for word, _ in asked.answer), *([IDS[END]] if kind == "caption" else [])]
    rest = LONGEST - len(question) - len(answer)
    return question + answer + [IDS[PAD]] * rest, [IGNORED] * len(question) + answer + [IGNORED] * rest


def regions_of(asked: Question, owner: Int[np.ndarray, "size size"]) -> Bool[np.ndarray, "word patch"]:
    """The true patches of every word of the text that ``written`` makes."""
    regions = np.zeros((LONGEST, (SIZE // PATCH) ** 2), dtype=bool)
    for place, (_, things) in enumerate((*asked.question, *asked.answer), start=1):
        if things:
            regions[place] = patches_of(owner, things, PATCH)
    return regions


def _answers(part: RenderedSplit) -> Int[Tensor, " sample"]:
    answers = part.labels.max(dim=1).values
    return answers.masked_fill(torch.tensor([kind == "caption" for kind in part.kinds]), IGNORED)
