"""Colored shapes and things drawn with Pillow, and which pixel belongs to which of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 44, 44),
    "green": (46, 160, 67),
    "blue": (45, 98, 208),
    "yellow": (240, 200, 40),
    "purple": (142, 68, 173),
    "black": (38, 38, 42),
}
DARK, LIGHT, BROWN, LINES = (84, 84, 92), (222, 236, 246), (122, 84, 52), (120, 120, 128)
SHADE = 0.72
"""A roof's brightness over its house's."""
FINE = 4
"""Drawn so many times larger, then averaged."""

Part = tuple[str, tuple[float, ...], tuple[int, int, int] | float]


def _star() -> tuple[float, ...]:
    points = []
    for corner in range(10):
        radius, angle = (0.5 if corner % 2 == 0 else 0.21), math.pi * (corner / 5 - 0.5)
        points += [0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)]
    return tuple(points)


PARTS: dict[str, tuple[Part, ...]] = {
    "circle": (("ellipse", (0.02, 0.02, 0.98, 0.98), 1.0),),
    "square": (("rectangle", (0.08, 0.08, 0.92, 0.92), 1.0),),
    "triangle": (("polygon", (0.5, 0.04, 1.0, 0.94, 0.0, 0.94), 1.0),),
    "star": (("polygon", _star(), 1.0),),
    "car": (
        ("polygon", (0.16, 0.48, 0.3, 0.2, 0.7, 0.2, 0.86, 0.48), 1.0),
        ("rectangle", (0.0, 0.46, 1.0, 0.76), 1.0),
        ("polygon", (0.26, 0.47, 0.35, 0.28, 0.48, 0.28, 0.48, 0.47), LIGHT),
        ("polygon", (0.54, 0.47, 0.54, 0.28, 0.66, 0.28, 0.76, 0.47), LIGHT),
        ("ellipse", (0.12, 0.62, 0.38, 0.88), DARK),
        ("ellipse", (0.62, 0.62, 0.88, 0.88), DARK),
    ),
    "truck": (
        ("rectangle", (0.0, 0.14, 0.62, 0.76), 1.0),
        ("polygon", (0.66, 0.36, 0.86, 0.36, 1.0, 0.56, 1.0, 0.76, 0.66, 0.76), 1.0),
        ("polygon", (0.73, 0.42, 0.83, 0.42, 0.92, 0.56, 0.73, 0.56), LIGHT),
        ("rectangle", (0.6, 0.68, 0.68, 0.76), DARK),
        ("ellipse", (0.1, 0.64, 0.34, 0.88), DARK),
        ("ellipse", (0.68, 0.64, 0.92, 0.88), DARK),
    ),
    "tree": (
        ("rectangle", (0.42, 0.6, 0.58, 1.0), BROWN),
        ("ellipse", (0.06, 0.22, 0.56, 0.72), 1.0),
        ("ellipse", (0.44, 0.22, 0.94, 0.72), 1.0),
        ("ellipse", (0.22, 0.0, 0.78, 0.56), 1.0),
    ),
    "house": (
        ("rectangle", (0.12, 0.42, 0.88, 1.0), 1.0),
        ("polygon", (0.5, 0.0, 1.0, 0.44, 0.0, 0.44), SHADE),
        ("rectangle", (0.22, 0.62, 0.42, 1.0), DARK),
        ("rectangle", (0.54, 0.56, 0.76, 0.76), LIGHT),
    ),
}
"""Shape -> what it is made of, in a square of side 1 from its upper left corner; a number is a color's brightness."""

SPEED: tuple[Part, ...] = tuple(
    ("rectangle", (-0.38, y, -0.08, y + 0.07), LINES) for y in (0.26, 0.46, 0.66)
)  # fmt: skip
"""Lines behind what moves; all drive to the right."""
VEHICLES = ("car", "truck")
BEHIND = 0.4
"""Room that the lines take, over the side."""


@dataclass(frozen=True)
class SceneObject:
    """One thing of a picture.

    Args:
        color: one of ``COLORS``.
        shape: one of ``PARTS``.
        x, y: upper left corner of its square, in pixels.
        side: of the square, in pixels.
        moving: a vehicle with lines behind it, to the left of its square.
    """

    color: str
    shape: str
    x: float = 0.0
    y: float = 0.0
    side: float = 16.0
    moving: bool = False

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.side / 2, self.y + self.side / 2

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, upper, right and lower edge, the lines behind it included."""
        left = self.x - BEHIND * self.side if self.moving else self.x
        return left, self.y, self.x + self.side, self.y + self.side


def render_scene(
    things: Sequence[SceneObject], size: int, ground: tuple[int, int, int] = (238, 238, 234)
) -> tuple[UInt8[np.ndarray, "3 size size"], Int[np.ndarray, "size size"]]:
    """A picture of things, later ones in front of earlier ones, and the owner of every pixel.

    Args:
        things: what is drawn.
        size: side of the picture in pixels.
        ground: color behind them.

    Returns:
        The picture, and the position in ``things`` of what covers at least half of the pixel, -1 where nothing does.

    Example:
        >>> picture, owner = render_scene([SceneObject("red", "square", x=2, y=2, side=4)], 8)
        >>> picture[:, 4, 4].tolist(), int(owner[4, 4]), int(owner[0, 0])
        ([214, 44, 44], 0, -1)
    """
    large = (size * FINE, size * FINE)
    picture, who = Image.new("RGB", large, ground), Image.new("L", large, 0)
    brush, marker = ImageDraw.Draw(picture), ImageDraw.Draw(who)
    for number, thing in enumerate(things, start=1):
        for form, points, paint in PARTS[thing.shape] + (SPEED if thing.moving else ()):
            scaled = _scaled(thing, points)
            getattr(brush, form)(scaled, fill=_mixed(thing.color, paint))
            getattr(marker, form)(scaled, fill=number)
    fine = np.asarray(who).reshape(size, FINE, size, FINE)
    covers = [(fine == number).mean(axis=(1, 3)) >= 0.5 for number in range(1, len(things) + 1)]
    owner = np.full((size, size), -1)
    for number, covered in enumerate(covers):
        owner[covered & (owner < 0)] = number
    return np.asarray(picture.reduce(FINE)).transpose(2, 0, 1).copy(), owner


def patches_of(owner: Int[np.ndarray, "size size"], things: Sequence[int], patch: int) -> np.ndarray:
    """(patch,) True for the patches, row by row, that hold a pixel of one of these things.

    Example:
        >>> patches_of(np.array([[-1, -1, 0, -1], [-1, -1, -1, -1], [-1] * 4, [1] * 4]), [0], 2).tolist()
        [False, True, False, False]
    """
    count = len(owner) // patch
    return np.isin(owner, list(things)).reshape(count, patch, count, patch).any(axis=(1, 3)).reshape(-1)


def _scaled(thing: SceneObject, points: tuple[float, ...]) -> list[float]:
    start = (thing.x, thing.y)
    return [FINE * (start[place % 2] + thing.side * point) for place, point in enumerate(points)]


def _mixed(color: str, paint: tuple[int, int, int] | float) -> tuple[int, int, int]:
    if isinstance(paint, tuple):
        return paint
    red, green, blue = (round(paint * part) for part in COLORS[color])
    return red, green, blue
