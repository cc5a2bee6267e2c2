"""`minimal_pairs`: pairs of scenes with two captions of the same words, which differ in binding, relation or number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, unknown_name
from ..counter_rng import CounterRNG
from ..dataset import Dataset, Split
from .scene_questions import KNOWN, NUMBERS, PLURALS, SHAPES, SIDES, Question, placed_objects
from .scene_rendering import VEHICLES, SceneObject, render_scene
from .scenes import GROUND, LEVELS, LONGEST, SIZE
from .text_codes import IDS, IMAGE, PAD, WORDS, encode_text

Things = tuple[SceneObject, ...]


@dataclass(frozen=True)
class MinimalPair:
    """Two images with one caption each.

    Attributes:
        kind: what differs.
        captions: captions of the two images, of the same words in another order.
        things: objects of the two images.
        light: brightness of the background of both images.
    """

    kind: str
    captions: tuple[str, str]
    things: tuple[Things, Things]
    light: int


class MinimalPairs(Dataset):
    """Pairs of images (3, 48, 48) whose captions have the same words, for Winoground scores.

    Samples 2 i and 2 i + 1 of a split are the two images of pair i, with their captions; the target is 0 and 1. Both
    images have the same objects, sizes, places and background, except for the following. See
    docs/data/minimal_pairs.md.

    - color: "a red car and a blue truck" / "a blue car and a red truck": two colors are exchanged.
    - left: "a red car left of a blue truck" / "a blue truck left of a red car": two objects exchange places and sizes.
    - above: the same with "above".
    - count: "one red and two blue cars" / "two red and one blue cars": the color of one object changes.
    - state: "the red car is parked and the blue truck is moving" / "... moving ... parked".
    - order: "a red car and a blue truck" / "a blue truck and a red car": as left, for models that were trained on the
      captions of `scenes`, which list objects from left to right. Not in the default.

    Args:
        pairs: pairs of each kind in each split.
        level: 2 or 3: sizes, positions and noise of that level of `scenes`.
        kinds: kinds of pairs.
        seed: seed of all random numbers.

    Raises:
        ConfigError: an unknown level or kind, no kind, a kind twice, or fewer than one pair.

    Example:
        >>> data = MinimalPairs(pairs=1, kinds=("color", "left"))
        >>> data.pair("test", 0).captions
        ('a green triangle and a black tree', 'a black triangle and a green tree')
        >>> data.test.target.tolist(), data.shapes["image"]
        ([0, 1, 0, 1], (3, 48, 48))
    """

    names = ("image", "text")
    task = "minimal_pairs"
    num_outputs = 2
    lexicon = WORDS
    vocabulary = {"text": len(WORDS)}  # noqa: RUF012

    def __init__(
        self, *, pairs: int = 200, level: int = 2, kinds: Sequence[str] = ("color", "left", "above", "count", "state"),
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.pair_kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        for kind in self.pair_kinds:
            if kind not in KINDS:
                raise unknown_name("MinimalPairs", "kind", str(kind), KINDS)
        if not self.pair_kinds or len(set(self.pair_kinds)) < len(self.pair_kinds):
            raise ConfigError("MinimalPairs", expected="one or more different kinds", got=f"kinds = {self.pair_kinds}")
        if level not in (2, 3):
            raise unknown_name("MinimalPairs", "level", str(level), ("2", "3"))
        if pairs < 1:
            raise ConfigError("MinimalPairs", expected="pairs >= 1", got=f"pairs = {pairs}")
        self.level = level
        self._pairs = {
            split: [draw_pair(split, index, kind, level, seed) for kind in self.pair_kinds for index in range(pairs)]
            for split in ("train", "val", "test")
        }
        self.train, self.val, self.test = (_rendered(part) for part in self._pairs.values())
        pixels = self.train.inputs["image"].float() / 255
        self._mean, self._deviation = pixels.mean().item(), pixels.std(correction=0).item()
        self.noise = {"image": (0.0, 1.0)}

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        """Standardizes the images; they have no noise, since the two images of a pair must not differ in it."""
        return {**inputs, "image": (inputs["image"].float() / 255 - self._mean) / self._deviation}

    def pair(self, split: str, index: int) -> MinimalPair:
        """Returns a pair of a split."""
        self.split(split)
        return self._pairs[split][index]

    def pairs(self, split: str) -> list[MinimalPair]:
        """Returns all pairs of a split; the images of pair i are samples 2 i and 2 i + 1."""
        self.split(split)
        return list(self._pairs[split])


@lru_cache(maxsize=50_000)
def draw_pair(split: str, index: int, kind: str, level: int, seed: int) -> MinimalPair:
    """Draws a pair, a function of its arguments alone."""
    rng = np.random.default_rng((seed, ("train", "val", "test").index(split), level, index, list(KINDS).index(kind)))
    things, axis, variants, captions = KINDS[kind](rng)
    chosen = LEVELS[level]
    order = None if axis is None else (axis, tuple(range(len(things))))
    question = placed_objects(
        Question(things, (), (), order), rng, size=SIZE, sides=chosen.sides, step=chosen.step, overlap=chosen.overlap
    )
    return MinimalPair(kind, captions, variants(question.things), int(rng.integers(*GROUND)))


Variants = Callable[[Things], tuple[Things, Things]]
Drawn = tuple[Things, int | None, Variants, tuple[str, str]]
"""Objects, the axis along which they are in order, the two images from placed objects, and the captions."""


def _color(rng: np.random.Generator) -> Drawn:
    (one, first), (two, second) = _two(rng, exchange=True)
    captions = (f"a {one} {first} and a {two} {second}", f"a {two} {first} and a {one} {second}")
    return (SceneObject(one, first), SceneObject(two, second)), 0, _recolored(one, two), captions


def _count(rng: np.random.Generator) -> Drawn:
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    one, two = rng.permutation([color for color, other in KNOWN if other == shape])[:2].tolist()
    things = tuple(SceneObject(color, shape) for color in (one, two, two))
    few, many = NUMBERS[1], NUMBERS[2]
    captions = (
        f"{few} {one} and {many} {two} {PLURALS[shape]}", f"{many} {one} and {few} {two} {PLURALS[shape]}"
    )  # fmt: skip
    if rng.integers(2):
        changed = int(rng.integers(1, 3))
        return things, None, lambda placed: (placed, _with(placed, changed, color=one)), captions
    # The other number first, so that the first caption does not always begin with "one".
    things = tuple(SceneObject(color, shape) for color in (one, one, two))
    changed = int(rng.integers(2))
    return things, None, lambda placed: (placed, _with(placed, changed, color=two)), (captions[1], captions[0])


def _state(rng: np.random.Generator) -> Drawn:
    pairs = [pair for pair in KNOWN if pair[1] in VEHICLES]
    (one, first), (two, second) = (pairs[n] for n in rng.permutation(len(pairs))[:2])
    states = ("parked", "moving") if rng.integers(2) else ("moving", "parked")
    captions = [f"the {one} {first} is {a} and the {two} {second} is {b}" for a, b in (states, states[::-1])]

    def variants(placed: Things) -> tuple[Things, Things]:
        one, two = (
            tuple(replace(thing, moving=state == "moving") for thing, state in zip(placed, order, strict=True))
            for order in (states, states[::-1])
        )
        return one, two

    # Both are placed with the lines of moving vehicles, so that they fit into the image in both states.
    things = (SceneObject(one, first, moving=True), SceneObject(two, second, moving=True))
    return things, None, variants, (captions[0], captions[1])


def _relation(word: str, joined: str) -> Callable[[np.random.Generator], Drawn]:
    def draw(rng: np.random.Generator) -> Drawn:
        (one, first), (two, second) = _two(rng, exchange=False)
        captions = (f"a {one} {first} {joined} a {two} {second}", f"a {two} {second} {joined} a {one} {first}")
        return (SceneObject(one, first), SceneObject(two, second)), SIDES[word][0], _exchanged, captions

    return draw


KINDS: dict[str, Callable[[np.random.Generator], Drawn]] = {
    "color": _color, "left": _relation("left", "left of"), "above": _relation("above", "above"), "count": _count,
    "state": _state, "order": _relation("left", "and"),
}  # fmt: skip
"""Kind -> function that draws its objects and captions."""


def _two(rng: np.random.Generator, *, exchange: bool) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two combinations of different colors and shapes that `scenes` has in training, also with exchanged colors."""
    while True:
        (one, first), (two, second) = (KNOWN[int(rng.integers(len(KNOWN)))] for _ in range(2))
        known = not exchange or ((one, second) in KNOWN and (two, first) in KNOWN)
        if one != two and first != second and known:
            return (one, first), (two, second)


def _recolored(one: str, two: str) -> Variants:
    return lambda placed: (placed, _with(_with(placed, 0, color=two), 1, color=one))


def _exchanged(placed: Things) -> tuple[Things, Things]:
    a, b = placed
    return placed, (replace(a, x=b.x, y=b.y, side=b.side), replace(b, x=a.x, y=a.y, side=a.side))


def _with(placed: Things, index: int, *, color: str) -> Things:
    return tuple(replace(thing, color=color) if n == index else thing for n, thing in enumerate(placed))


def _rendered(pairs: Sequence[MinimalPair]) -> Split:
    pictures, texts = [], []
    for pair in pairs:
        ground = (pair.light, pair.light, pair.light - 4)
        for things, caption in zip(pair.things, pair.captions, strict=True):
            pictures.append(render_scene(things, SIZE, ground)[0])
            ids = [IDS[IMAGE], IDS["describe"], *encode_text(caption)]
            texts.append(ids + [IDS[PAD]] * (LONGEST - len(ids)))
    target = torch.tensor([0, 1] * len(pairs))
    return Split({"image": torch.from_numpy(np.stack(pictures)), "text": torch.tensor(texts)}, target)
