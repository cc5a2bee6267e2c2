"""What is asked and said of a scene: things are chosen for the question, so that its answers are balanced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .drawing import COLOURS, PARTS, VEHICLES, Thing

SHAPES = tuple(PARTS)
PLURALS = {shape: f"{shape}s" for shape in SHAPES}
NUMBERS = ("zero", "one", "two", "three")
SIDES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Word -> axis, and which end of it."""
HELD_OUT = tuple((list(COLOURS)[(place + 4) % len(COLOURS)], shape) for place, shape in enumerate(SHAPES))
"""(colour, shape) that are in the test split alone: one colour of each shape."""
KNOWN = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)

Word = tuple[str, tuple[int, ...]]
"""A word, and the positions of the things that it speaks of."""


@dataclass(frozen=True)
class Asked:
    """Things and a text about them; where the things stand is not decided yet.

    Attributes:
        things: in no order; those that ``answer`` needs in a place of its own are told by ``places``.
        question: words before the answer.
        answer: one word, or a caption.
        order: (axis, positions): the things must stand in this order along axis 0 (to the right) or 1 (down).
    """

    things: tuple[Thing, ...]
    question: tuple[Word, ...]
    answer: tuple[Word, ...]
    order: tuple[int, tuple[int, ...]] | None = None


class Chooser:
    """Draws things for one sample.

    Args:
        rng: of the sample.
        most: things of a picture.
        new: what is asked about has a combination of ``HELD_OUT``.
    """

    def __init__(self, rng: np.random.Generator, most: int, new: bool = False) -> None:
        self.rng, self.most, self.new = rng, most, new

    def pair(self, allowed: Callable[[str, str], bool] = lambda colour, shape: True) -> tuple[str, str]:
        """What is asked about."""
        return self._one(HELD_OUT if self.new else KNOWN, allowed)

    def other(self, allowed: Callable[[str, str], bool]) -> Thing:
        """What stands beside it."""
        return self.thing(*self._one(KNOWN, allowed))

    def others(self, allowed: Callable[[str, str], bool]) -> tuple[Thing, ...]:
        return tuple(self.other(allowed) for _ in range(self.beside()))

    def beside(self) -> int:
        """How many stand beside the first: none, up to as many as there is room for."""
        return int(self.rng.integers(self.most))

    def thing(self, colour: str, shape: str) -> Thing:
        return Thing(colour, shape, moving=shape in VEHICLES and self.flip())

    def flip(self) -> bool:
        return bool(self.rng.integers(2))

    def _one(self, pairs: Sequence[tuple[str, str]], allowed: Callable[[str, str], bool]) -> tuple[str, str]:
        possible = [pair for pair in pairs if allowed(*pair)]
        return possible[int(self.rng.integers(len(possible)))]


def plain(words: str) -> tuple[Word, ...]:
    """Words that speak of no thing.

    Example:
        >>> plain("is there")
        (('is', ()), ('there', ()))
    """
    return tuple((word, ()) for word in words.split())


def colour(chooser: Chooser) -> Asked:
    """What colour is the car? There is one car."""
    shade, shape = chooser.pair()
    things = (chooser.thing(shade, shape), *chooser.others(lambda _, other: other != shape))
    return Asked(things, (*plain("what colour is the"), (shape, (0,))), ((shade, (0,)),))


def object_(chooser: Chooser) -> Asked:
    """What is red? One thing is."""
    shade, shape = chooser.pair()
    things = (chooser.thing(shade, shape), *chooser.others(lambda other, _: other != shade))
    return Asked(things, (*plain("what is"), (shade, (0,))), ((shape, (0,)),))


def existence(chooser: Chooser) -> Asked:
    """Is there a red car? Where there is none, there is a red thing, or a car, or both."""
    shade, shape = chooser.pair()
    if chooser.flip():
        things = (chooser.thing(shade, shape), *chooser.others(lambda *pair: pair != (shade, shape)))
        return Asked(things, (*plain("is there a"), (shade, (0,)), (shape, (0,))), plain("yes"))
    halves = [lambda c, s: c == shade and s != shape, lambda c, s: c != shade and s == shape]
    first = int(chooser.rng.integers(2))
    things = [chooser.other(halves[first])]
    for place in range(chooser.beside()):
        things.append(chooser.other(halves[1 - first] if place == 0 else lambda *pair: pair != (shade, shape)))
    return Asked(tuple(things), (*plain("is there a"), (shade, ()), (shape, ())), plain("no"))


def count(chooser: Chooser) -> Asked:
    """How many cars? None to three, equally often."""
    number = int(chooser.rng.integers(chooser.most + 1))
    _, shape = chooser.pair()
    counted = [chooser.thing(*chooser.pair(lambda _, s: s == shape)) for _ in range(number)]
    total = max(number, 1 + chooser.beside())
    rest = [chooser.other(lambda _, s: s != shape) for _ in range(total - number)]
    where = tuple(range(number))
    return Asked((*counted, *rest), (*plain("how many"), (PLURALS[shape], where)), plain(NUMBERS[number]))


def relation(chooser: Chooser) -> Asked:
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
    question = (*plain(f"what is {said} the"), (shapes[1], (1,)))
    return Asked(tuple(things), question, ((shapes[answer], (answer,)),), order=(axis, (0, 1, 2)))


def state(chooser: Chooser) -> Asked:
    """The red car is ... parked, or moving, with lines behind it."""
    shade, shape = chooser.pair(lambda _, s: s in VEHICLES)
    things = (chooser.thing(shade, shape), *chooser.others(lambda *pair: pair != (shade, shape)))
    question = (*plain("the"), (shade, (0,)), (shape, (0,)), *plain("is"))
    return Asked(things, question, ((("moving" if things[0].moving else "parked"), (0,)),))


def caption(chooser: Chooser) -> Asked:
    """A red car and a blue truck: all things, from left to right."""
    things = [chooser.thing(*chooser.pair())]
    for _ in range(chooser.beside()):
        pairs = {(thing.colour, thing.shape) for thing in things}
        things.append(chooser.other(lambda *pair, pairs=pairs: pair not in pairs))
    chooser.rng.shuffle(things)  # type: ignore[arg-type]
    said: list[Word] = []
    for place, thing in enumerate(things):
        said += [*plain("and a" if place else "a"), (thing.colour, (place,)), (thing.shape, (place,))]
    return Asked(tuple(things), plain("describe"), tuple(said), order=(0, tuple(range(len(things)))))


KINDS: dict[str, Callable[[Chooser], Asked]] = {
    "caption": caption, "colour": colour, "object": object_, "existence": existence, "state": state, "count": count,
    "relation": relation,
}  # fmt: skip
QUESTIONS = tuple(kind for kind in KINDS if kind != "caption")


def placed(
    asked: Asked, rng: np.random.Generator, *, size: int, sides: Sequence[int], step: int, overlap: float
) -> Asked:  # fmt: skip
    """The same with every thing in its place: inside the picture, in the order that the answer asks for.

    No two centres are closer than ``APART`` along either axis, so that "left of" and "above" are never in doubt.

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


def _ordered(things: list[Thing], axis: int, order: tuple[int, ...]) -> list[Thing]:
    """The places swapped among the things until they stand in order."""
    places = sorted(range(len(things)), key=lambda place: things[place].centre[axis])
    made = list(things)
    for thing, place in zip(order, places, strict=True):
        spot = things[place]
        made[thing] = replace(things[thing], x=spot.x, y=spot.y, side=spot.side)
    return made


def _fit(a: Thing, b: Thing, overlap: float) -> bool:
    if any(abs(p - q) < APART for p, q in zip(a.centre, b.centre, strict=True)):
        return False
    (left, top, right, bottom), (left2, top2, right2, bottom2) = a.box, b.box
    shared = max(0.0, min(right, right2) - max(left, left2)) * max(0.0, min(bottom, bottom2) - max(top, top2))
    return shared <= overlap * min((right - left) * (bottom - top), (right2 - left2) * (bottom2 - top2))
