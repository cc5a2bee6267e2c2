"""Renders colored shapes and vehicles with Pillow, with the object index of each pixel."""

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
"""Brightness of a roof relative to its house."""
FINE = 4
"""Supersampling factor."""

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
"""Shape -> (Pillow primitive, coordinates in the unit square, RGB color or brightness of the object's color)."""

SPEED: tuple[Part, ...] = tuple(
    ("rectangle", (-0.38, y, -0.08, y + 0.07), LINES) for y in (0.26, 0.46, 0.66)
)  # fmt: skip
"""Lines behind moving vehicles, which all drive to the right."""
VEHICLES = ("car", "truck")
BEHIND = 0.4
"""Width of the lines, relative to the side."""


@dataclass(frozen=True)
class SceneObject:
    """One object of an image.

    Args:
        color: one of ``COLORS``.
        shape: one of ``PARTS``.
        x, y: upper left corner of its square, in pixels.
        side: side of the square, in pixels.
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
        """Left, upper, right and lower edge, including the lines of a moving vehicle."""
        left = self.x - BEHIND * self.side if self.moving else self.x
        return left, self.y, self.x + self.side, self.y + self.side


def render_scene(
    things: Sequence[SceneObject], size: int, ground: tuple[int, int, int] = (238, 238, 234)
) -> tuple[UInt8[np.ndarray, "3 size size"], Int[np.ndarray, "size size"]]:
    """Renders objects, later ones in front of earlier ones.

    Args:
        things: objects.
        size: side of the image, in pixels.
        ground: background color.

    Returns:
        The image, and for each pixel the index of the object that covers at least half of it, or -1.

    Example:
        >>> picture, owner = render_scene([SceneObject("red", "square", x=2, y=2, side=4)], 8)
        >>> picture[:, 4, 4].tolist(), int(owner[4, 4]), int(owner[0, 0])
        ([214, 44, 44], 0, -1)
    """
    large = (size * FINE, size * FINE)
    picture, labels = Image.new("RGB", large, ground), Image.new("L", large, 0)
    brush, marker = ImageDraw.Draw(picture), ImageDraw.Draw(labels)
    for number, thing in enumerate(things, start=1):
        for form, points, paint in PARTS[thing.shape] + (SPEED if thing.moving else ()):
            scaled = _to_pixels(thing, points)
            getattr(brush, form)(scaled, fill=_rgb(thing.color, paint))
            getattr(marker, form)(scaled, fill=number)
    fine = np.asarray(labels).reshape(size, FINE, size, FINE)
    covers = [(fine == number).mean(axis=(1, 3)) >= 0.5 for number in range(1, len(things) + 1)]
    owner = np.full((size, size), -1)
    for number, covered in enumerate(covers):
        owner[covered & (owner < 0)] = number
    return np.asarray(picture.reduce(FINE)).transpose(2, 0, 1).copy(), owner


def patches_of(owner: Int[np.ndarray, "size size"], things: Sequence[int], patch: int) -> np.ndarray:
    """Returns (patch,) bool, row by row: True if a patch contains a pixel of one of the given objects.

    Example:
        >>> patches_of(np.array([[-1, -1, 0, -1], [-1, -1, -1, -1], [-1] * 4, [1] * 4]), [0], 2).tolist()
        [False, True, False, False]
    """
    count = len(owner) // patch
    return np.isin(owner, list(things)).reshape(count, patch, count, patch).any(axis=(1, 3)).reshape(-1)


def _to_pixels(thing: SceneObject, points: tuple[float, ...]) -> list[float]:
    start = (thing.x, thing.y)
    return [FINE * (start[index % 2] + thing.side * point) for index, point in enumerate(points)]


def _rgb(color: str, paint: tuple[int, int, int] | float) -> tuple[int, int, int]:
    if isinstance(paint, tuple):
        return paint
    red, green, blue = (round(paint * part) for part in COLORS[color])
    return red, green, blue
