"""Questions and captions of scenes; objects are sampled for the question so that its answers are balanced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .scene_rendering import COLORS, PARTS, VEHICLES, SceneObject

SHAPES = tuple(PARTS)
PLURALS = {shape: f"{shape}s" for shape in SHAPES}
NUMBERS = ("zero", "one", "two", "three")
SIDES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Word -> axis and direction along it."""
HELD_OUT = tuple((list(COLORS)[(position + 4) % len(COLORS)], shape) for position, shape in enumerate(SHAPES))
"""(color, shape) combinations of the test split only: one color of each shape."""
KNOWN = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)

Word = tuple[str, tuple[int, ...]]
"""A word, and the indices of the objects that it refers to."""


@dataclass(frozen=True)
class Question:
    """Objects and a text about them.

    Attributes:
        things: objects; ``placed_objects`` sets their positions.
        question: words before the answer.
        answer: one word, or a caption.
        order: (axis, indices): order of the objects along axis 0 (to the right) or 1 (down); None for any order.
    """

    things: tuple[SceneObject, ...]
    question: tuple[Word, ...]
    answer: tuple[Word, ...]
    order: tuple[int, tuple[int, ...]] | None = None


class SceneSampler:
    """Samples the objects of one scene.

    Args:
        rng: generator of the sample.
        most: largest number of objects in an image.
        new: the object in question has a combination of ``HELD_OUT``.
    """

    def __init__(self, rng: np.random.Generator, most: int, new: bool = False) -> None:
        self.rng, self.most, self.new = rng, most, new

    def pair(self, allowed: Callable[[str, str], bool] = lambda color, shape: True) -> tuple[str, str]:
        """Samples the color and shape of the object in question."""
        return self._one(HELD_OUT if self.new else KNOWN, allowed)

    def other(self, allowed: Callable[[str, str], bool]) -> SceneObject:
        """Samples another object."""
        return self.thing(*self._one(KNOWN, allowed))

    def others(self, allowed: Callable[[str, str], bool]) -> tuple[SceneObject, ...]:
        return tuple(self.other(allowed) for _ in range(self.beside()))

    def beside(self) -> int:
        """Samples the number of other objects, from 0 to ``most`` - 1."""
        return int(self.rng.integers(self.most))

    def thing(self, color: str, shape: str) -> SceneObject:
        return SceneObject(color, shape, moving=shape in VEHICLES and self.flip())

    def flip(self) -> bool:
        return bool(self.rng.integers(2))

    def _one(self, pairs: Sequence[tuple[str, str]], allowed: Callable[[str, str], bool]) -> tuple[str, str]:
        possible = [pair for pair in pairs if allowed(*pair)]
        return possible[int(self.rng.integers(len(possible)))]


def plain_question(words: str) -> tuple[Word, ...]:
    """Splits a text into words that refer to no object.

    Example:
        >>> plain_question("is there")
        (('is', ()), ('there', ()))
    """
    return tuple((word, ()) for word in words.split())


def color_question(chooser: SceneSampler) -> Question:
    """Returns "what color is the car" about the only car."""
    shade, shape = chooser.pair()
    things = (chooser.thing(shade, shape), *chooser.others(lambda _, other: other != shape))
    return Question(things, (*plain_question("what color is the"), (shape, (0,))), ((shade, (0,)),))


def object_question(chooser: SceneSampler) -> Question:
    """Returns "what is red" about the only red object."""
    shade, shape = chooser.pair()
    things = (chooser.thing(shade, shape), *chooser.others(lambda other, _: other != shade))
    return Question(things, (*plain_question("what is"), (shade, (0,))), ((shape, (0,)),))


def existence_question(chooser: SceneSampler) -> Question:
    """Returns "is there a red car"; if the answer is no, there is another red object or another car, or both."""
    shade, shape = chooser.pair()
    if chooser.flip():
        things = (chooser.thing(shade, shape), *chooser.others(lambda *pair: pair != (shade, shape)))
        return Question(things, (*plain_question("is there a"), (shade, (0,)), (shape, (0,))), plain_question("yes"))
    halves = [lambda c, s: c == shade and s != shape, lambda c, s: c != shade and s == shape]
    first = int(chooser.rng.integers(2))
    things = [chooser.other(halves[first])]
    for position in range(chooser.beside()):
        things.append(chooser.other(halves[1 - first] if position == 0 else lambda *pair: pair != (shade, shape)))
    return Question(tuple(things), (*plain_question("is there a"), (shade, ()), (shape, ())), plain_question("no"))


def count_question(chooser: SceneSampler) -> Question:
    """Returns "how many cars", with all numbers from 0 to ``most`` equally likely."""
    number = int(chooser.rng.integers(chooser.most + 1))
    _, shape = chooser.pair()
    counted = [chooser.thing(*chooser.pair(lambda _, s: s == shape)) for _ in range(number)]
    total = max(number, 1 + chooser.beside())
    rest = [chooser.other(lambda _, s: s != shape) for _ in range(total - number)]
    counted_indices = tuple(range(number))
    return Question(
        (*counted, *rest),
        (*plain_question("how many"), (PLURALS[shape], counted_indices)),
        plain_question(NUMBERS[number]),
    )


def relation_question(chooser: SceneSampler) -> Question:
    """Returns "what is left of the car" about the middle one of three objects."""
    shapes: list[str] = []
    things = []
    for _ in range(3):
        pair = chooser.pair(lambda _, s: s not in shapes)
        shapes.append(pair[1])
        things.append(chooser.thing(*pair))
    word = list(SIDES)[int(chooser.rng.integers(len(SIDES)))]
    axis, end = SIDES[word]
    words = f"{word} of" if axis == 0 else word
    answer = 0 if end < 0 else 2
    question = (*plain_question(f"what is {words} the"), (shapes[1], (1,)))
    return Question(tuple(things), question, ((shapes[answer], (answer,)),), order=(axis, (0, 1, 2)))


def state_question(chooser: SceneSampler) -> Question:
    """Returns "the red car is" with the answer parked or moving; a moving one has lines behind it."""
    shade, shape = chooser.pair(lambda _, s: s in VEHICLES)
    things = (chooser.thing(shade, shape), *chooser.others(lambda *pair: pair != (shade, shape)))
    question = (*plain_question("the"), (shade, (0,)), (shape, (0,)), *plain_question("is"))
    return Question(things, question, ((("moving" if things[0].moving else "parked"), (0,)),))


def scene_caption(chooser: SceneSampler) -> Question:
    """Returns a caption of all objects from left to right, such as "a red car and a blue truck"."""
    things = [chooser.thing(*chooser.pair())]
    for _ in range(chooser.beside()):
        pairs = {(thing.color, thing.shape) for thing in things}
        things.append(chooser.other(lambda *pair, pairs=pairs: pair not in pairs))
    chooser.rng.shuffle(things)  # type: ignore[arg-type]
    words: list[Word] = []
    for position, thing in enumerate(things):
        words += [*plain_question("and a" if position else "a"), (thing.color, (position,)), (thing.shape, (position,))]
    return Question(tuple(things), plain_question("describe"), tuple(words), order=(0, tuple(range(len(things)))))


KINDS: dict[str, Callable[[SceneSampler], Question]] = {
    "caption": scene_caption, "color": color_question, "object": object_question,
    "existence": existence_question, "state": state_question, "count": count_question,
    "relation": relation_question,
}  # fmt: skip
QUESTIONS = tuple(kind for kind in KINDS if kind != "caption")


def placed_objects(
    question: Question, rng: np.random.Generator, *, size: int, sides: Sequence[int], step: int, overlap: float
) -> Question:  # fmt: skip
    """Samples positions and sizes of the objects by rejection; the result satisfies ``question.order``.

    No two centers are closer than ``APART`` along either axis, so that "left of" and "above" are unambiguous.

    Args:
        question: question whose objects are placed.
        rng: generator of the sample.
        size: side of the image, in pixels.
        sides: possible sides of an object, in pixels.
        step: positions are multiples of it, in pixels.
        overlap: largest fraction of an object's square that another one may cover.
    """
    while True:
        things = []
        for thing in question.things:
            side = int(sides[int(rng.integers(len(sides)))])
            x, y = (step * float(rng.integers((size - side) // step + 1)) for _ in range(2))
            things.append(replace(thing, x=x, y=y, side=float(side)))
        if question.order is not None:
            things = _ordered(things, *question.order)
        fits = all(_fit(a, b, overlap) for position, a in enumerate(things) for b in things[:position])
        if fits and all(thing.box[0] >= 0 for thing in things):
            return replace(question, things=tuple(things))


APART = 3
"""Smallest distance of two centers along each axis, in pixels."""


def _ordered(things: list[SceneObject], axis: int, order: tuple[int, ...]) -> list[SceneObject]:
    """Permutes positions and sizes among the objects so that they are in order."""
    positions = sorted(range(len(things)), key=lambda position: things[position].center[axis])
    result = list(things)
    for thing, position in zip(order, positions, strict=True):
        source = things[position]
        result[thing] = replace(things[thing], x=source.x, y=source.y, side=source.side)
    return result


def _fit(a: SceneObject, b: SceneObject, overlap: float) -> bool:
    if any(abs(p - q) < APART for p, q in zip(a.center, b.center, strict=True)):
        return False
    (left, top, right, bottom), (left2, top2, right2, bottom2) = a.box, b.box
    shared = max(0.0, min(right, right2) - max(left, left2)) * max(0.0, min(bottom, bottom2) - max(top, top2))
    return shared <= overlap * min((right - left) * (bottom - top), (right2 - left2) * (bottom2 - top2))
