"""What is asked and said of a scene: things are chosen for the question, so that its answers are balanced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .scene_rendering import COLORS, PARTS, VEHICLES, SceneObject

SHAPES = tuple(PARTS)
PLURALS = {shape: f"{shape}s" for shape in SHAPES}
NUMBERS = ("zero", "one", "two", "three")
SIDES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Word -> axis, and which end of it."""
HELD_OUT = tuple((list(COLORS)[(place + 4) % len(COLORS)], shape) for place, shape in enumerate(SHAPES))
"""(color, shape) that are in the test split alone: one color of each shape."""
KNOWN = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)

Word = tuple[str, tuple[int, ...]]
"""A word, and the positions of the things that it speaks of."""


@dataclass(frozen=True)
class Question:
    """Things and a text about them; where the things stand is not decided yet.

    Attributes:
        things: in no order; those that ``answer`` needs in a place of its own are told by ``places``.
        question: words before the answer.
        answer: one word, or a caption.
        order: (axis, positions): the things must stand in this order along axis 0 (to the right) or 1 (down).
    """

    things: tuple[SceneObject, ...]
    question: tuple[Word, ...]
    answer: tuple[Word, ...]
    order: tuple[int, tuple[int, ...]] | None = None


class SceneSampler:
    """Draws things for one sample.

    Args:
        rng: of the sample.
        most: things of a picture.
        new: what is asked about has a combination of ``HELD_OUT``.
    """

    def __init__(self, rng: np.random.Generator, most: int, new: bool = False) -> None:
        self.rng, self.most, self.new = rng, most, new

    def pair(self, allowed: Callable[[str, str], bool] = lambda color, shape: True) -> tuple[str, str]:
        """What is asked about."""
        return self._one(HELD_OUT if self.new else KNOWN, allowed)

    def other(self, allowed: Callable[[str, str], bool]) -> SceneObject:
        """What stands beside it."""
        return self.thing(*self._one(KNOWN, allowed))

    def others(self, allowed: Callable[[str, str], bool]) -> tuple[SceneObject, ...]:
        return tuple(self.other(allowed) for _ in range(self.beside()))

    def beside(self) -> int:
        """How many stand beside the first: none, up to as many as there is room for."""
        return int(self.rng.integers(self.most))

    def thing(self, color: str, shape: str) -> SceneObject:
        return SceneObject(color, shape, moving=shape in VEHICLES and self.flip())

    def flip(self) -> bool:
        return bool(self.rng.integers(2))

    def _one(self, pairs: Sequence[tuple[str, str]], allowed: Callable[[str, str], bool]) -> tuple[str, str]:
        possible = [pair for pair in pairs if allowed(*pair)]
        return possible[int(self.rng.integers(len(possible)))]


def plain_question(words: str) -> tuple[Word, ...]:
    """Words that speak of no thing.

    Example:
        >>> plain_question("is there")
        (('is', ()), ('there', ()))
    """
    return tuple((word, ()) for word in words.split())


def color_question(chooser: SceneSampler) -> Question:
    """What color is the car? There is one car."""
    shade, shape = chooser.pair()
    things = (chooser.thing(shade, shape), *chooser.others(lambda _, other: other != shape))
    return Question(things, (*plain_question("what color is the"), (shape, (0,))), ((shade, (0,)),))


def object_question(chooser: SceneSampler) -> Question:
    """What is red? One thing is."""
    shade, shape = chooser.pair()
    things = (chooser.thing(shade, shape), *chooser.others(lambda other, _: other != shade))
    return Question(things, (*plain_question("what is"), (shade, (0,))), ((shape, (0,)),))


def existence_question(chooser: SceneSampler) -> Question:
    """Is there a red car? Where there is none, there is a red thing, or a car, or both."""
    shade, shape = chooser.pair()
    if chooser.flip():
        things = (chooser.thing(shade, shape), *chooser.others(lambda *pair: pair != (shade, shape)))
        return Question(things, (*plain_question("is there a"), (shade, (0,)), (shape, (0,))), plain_question("yes"))
    halves = [lambda c, s: c == shade and s != shape, lambda c, s: c != shade and s == shape]
    first = int(chooser.rng.integers(2))
    things = [chooser.other(halves[first])]
    for place in range(chooser.beside()):
        things.append(chooser.other(halves[1 - first] if place == 0 else lambda *pair: pair != (shade, shape)))
    return Question(tuple(things), (*plain_question("is there a"), (shade, ()), (shape, ())), plain_question("no"))


def count_question(chooser: SceneSampler) -> Question:
    """How many cars? None to three, equally often."""
    number = int(chooser.rng.integers(chooser.most + 1))
    _, shape = chooser.pair()
    counted = [chooser.thing(*chooser.pair(lambda _, s: s == shape)) for _ in range(number)]
    total = max(number, 1 + chooser.beside())
    rest = [chooser.other(lambda _, s: s != shape) for _ in range(total - number)]
    where = tuple(range(number))
    return Question(
        (*counted, *rest), (*plain_question("how many"), (PLURALS[shape], where)), plain_question(NUMBERS[number])
    )


def relation_question(chooser: SceneSampler) -> Question:
    """What is left of the car? It stands between two others."""
    shapes: list[str] = []
    things = []
    for _ in range(3):
        pair = chooser.pair(lambda _, s: s not in shapes)
        shapes.append(pair[1])
        things.append(chooser.thing(*pair))
    word = list(SIDES)[int(chooser.rng.integers(len(SIDES)))]
    axis, end = SIDES[word]
    said = f"{word} of" if axis == 0 else word
    answer = 0 if end < 0 else 2
    question = (*plain_question(f"what is {said} the"), (shapes[1], (1,)))
    return Question(tuple(things), question, ((shapes[answer], (answer,)),), order=(axis, (0, 1, 2)))


def state_question(chooser: SceneSampler) -> Question:
    """The red car is ... parked, or moving, with lines behind it."""
    shade, shape = chooser.pair(lambda _, s: s in VEHICLES)
    things = (chooser.thing(shade, shape), *chooser.others(lambda *pair: pair != (shade, shape)))
    question = (*plain_question("the"), (shade, (0,)), (shape, (0,)), *plain_question("is"))
    return Question(things, question, ((("moving" if things[0].moving else "parked"), (0,)),))


def scene_caption(chooser: SceneSampler) -> Question:
    """A red car and a blue truck: all things, from left to right."""
    things = [chooser.thing(*chooser.pair())]
    for _ in range(chooser.beside()):
        pairs = {(thing.color, thing.shape) for thing in things}
        things.append(chooser.other(lambda *pair, pairs=pairs: pair not in pairs))
    chooser.rng.shuffle(things)  # type: ignore[arg-type]
    said: list[Word] = []
    for place, thing in enumerate(things):
        said += [*plain_question("and a" if place else "a"), (thing.color, (place,)), (thing.shape, (place,))]
    return Question(tuple(things), plain_question("describe"), tuple(said), order=(0, tuple(range(len(things)))))


KINDS: dict[str, Callable[[SceneSampler], Question]] = {
    "caption": scene_caption, "color": color_question, "object": object_question,
    "existence": existence_question, "state": state_question, "count": count_question,
    "relation": relation_question,
}  # fmt: skip
QUESTIONS = tuple(kind for kind in KINDS if kind != "caption")


def placed_objects(
    asked: Question, rng: np.random.Generator, *, size: int, sides: Sequence[int], step: int, overlap: float
) -> Question:  # fmt: skip
    """The same with every thing in its place: inside the picture, in the order that the answer asks for.

    No two centers are closer than ``APART`` along either axis, so that "left of" and "above" are never in doubt.

    Args:
        asked: what is to be placed.
        rng: of the sample.
        size: side of the picture.
        sides: that a thing may have, in pixels.
        step: things stand at multiples of it, in pixels.
        overlap: the largest part of a thing's square that another one may cover.
    """
    while True:
        things = []
        for thing in asked.things:
            side = int(sides[int(rng.integers(len(sides)))])
            x, y = (step * float(rng.integers((size - side) // step + 1)) for _ in range(2))
            things.append(replace(thing, x=x, y=y, side=float(side)))
        if asked.order is not None:
            things = _ordered(things, *asked.order)
        fits = all(_fit(a, b, overlap) for place, a in enumerate(things) for b in things[:place])
        if fits and all(thing.box[0] >= 0 for thing in things):
            return replace(asked, things=tuple(things))


APART = 3


def _ordered(things: list[SceneObject], axis: int, order: tuple[int, ...]) -> list[SceneObject]:
    """The places swapped among the things until they stand in order."""
    places = sorted(range(len(things)), key=lambda place: things[place].center[axis])
    made = list(things)
    for thing, place in zip(order, places, strict=True):
        spot = things[place]
        made[thing] = replace(things[thing], x=spot.x, y=spot.y, side=spot.side)
    return made


def _fit(a: SceneObject, b: SceneObject, overlap: float) -> bool:
    if any(abs(p - q) < APART for p, q in zip(a.center, b.center, strict=True)):
        return False
    (left, top, right, bottom), (left2, top2, right2, bottom2) = a.box, b.box
    shared = max(0.0, min(right, right2) - max(left, left2)) * max(0.0, min(bottom, bottom2) - max(top, top2))
    return shared <= overlap * min((right - left) * (bottom - top), (right2 - left2) * (bottom2 - top2))
