"""Regions of an image that its tiles cover, from the output of the processor for images of coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

TOLERANCE = 0.025
"""Largest deviation of a pixel from its place on a linear scale, relative to the side of the image."""

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge relative to the size of the image; beyond 0 and 1 in padding."""


class Tile(NamedTuple):
    """A tile in the model's input: the index of its image, the region that it covers, and its height and width."""

    image: int
    box: Box
    size: tuple[int, int]


def locate_tiles(
    process: Callable[[Mapping[str, Any]], Mapping[str, Any]], images: Sequence[Image.Image]
) -> list[Tile] | None:
    """Returns the region of its image that each tile in ``pixel_values`` covers; None if one is not a linear section.

    The images are replaced by a black one, a white one, and one whose red and green channels are the coordinates x
    and y. With p the processor, (p(coordinates) - p(black)) / (p(white) - p(black)) is the coordinate of each pixel for
    any scaling, crop, padding, division into tiles and normalization. Padding is where black and white are equal.

    Args:
        process: function from ``{"images": [...]}`` to the model's inputs.
        images: the images of the prompt.
    """
    probes = zip(*(_probes(n, len(images), image.size) for n, image in enumerate(images)), strict=True)
    black, white, coded = (_pixels(process({"images": list(version)})) for version in probes)
    if black is None or white is None or coded is None or not black.shape == white.shape == coded.shape:
        return None
    extent = white - black
    top = extent.abs().amax()
    if not top:
        return None
    tiles = []
    for tile in range(len(coded)):
        inside = (extent[tile].abs() > 0.5 * top).all(dim=0)
        if not inside.any():
            # Padding of the batch to the largest number of tiles.
            continue
        rows, across = inside.any(dim=1), inside.any(dim=0)
        if not torch.equal(inside, rows[:, None] & across):
            return None
        values = (coded[tile] - black[tile]) / extent[tile]
        # Interpolation mixes the outermost pixels with padding.
        rows, across = _inner(rows), _inner(across)
        values = values[:, rows][:, :, across]
        index = float(values[2].median()) * len(images) - 0.5
        if abs(index - round(index)) > 0.25:
            return None
        width, height = images[round(index)].size
        spans = (_span(values[0], across, width), _span(values[1].T, rows, height))
        if spans[0] is None or spans[1] is None:
            return None
        (left, right), (upper, lower) = spans[0], spans[1]
        tiles.append(Tile(round(index), (left, upper, right, lower), (len(rows), len(across))))
    return tiles


def count_tiles(inputs: Mapping[str, Any]) -> int:
    """Returns the number of tiles in ``pixel_values``, without those of zeros, which fill up a batch; 0 if unknown."""
    pixels = _pixels(inputs)
    return 0 if pixels is None else int(pixels.flatten(1).any(dim=1).sum())


def _probes(index: int, count: int, size: tuple[int, int]) -> list[Image.Image]:
    """A black and a white image, and one of coordinates, whose blue channel is the index of the image."""
    width, height = size
    coded = np.empty((height, width, 3), dtype=np.uint8)
    for channel, places in enumerate((_levels(width), _levels(height)[:, None], round(255 * (index + 0.5) / count))):
        coded[..., channel] = places
    return [Image.new("RGB", size, "black"), Image.new("RGB", size, "white"), Image.fromarray(coded)]


def _levels(side: int) -> np.ndarray:
    """Coordinates of the pixel centers, from 0 to 255."""
    return (255 * (np.arange(side) + 0.5) / side).round().astype(np.uint8)


def _pixels(inputs: Mapping[str, Any]) -> Float[Tensor, "tile 3 row column"] | None:
    values = [
        value for name, value in inputs.items()
        if name.endswith("pixel_values") and isinstance(value, Tensor) and value.ndim >= 4 and value.shape[-3] == 3
    ]  # fmt: skip
    return values[0].flatten(0, -4).float().cpu() if len(values) == 1 else None


def _inner(inside: Tensor) -> Tensor:
    """Without the two outermost pixels at each end, or one of few."""
    places = inside.nonzero().flatten()
    cut = 2 if len(places) > 8 else int(len(places) > 4)
    inner = torch.zeros_like(inside)
    inner[places[cut : len(places) - cut]] = True
    return inner


def _span(values: Float[Tensor, "row column"], inside: Tensor, side: int) -> tuple[float, float] | None:
    """Coordinates of the first and last edge of a tile, by a line through the pixels ``inside``; None if not linear."""
    places = inside.nonzero().flatten().double() + 0.5
    mean = values.double().mean(dim=0)
    if float((values - mean).abs().max()) > TOLERANCE:
        return None
    # Enlarging extends the centers of the outermost pixels of the image to its edge.
    linear = (mean > 1 / side) & (mean < 1 - 1 / side)
    x, y = places[linear], mean[linear]
    if len(x) < 2:
        return None
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    start = float(y.mean() - slope * x.mean())
    if slope <= 0 or float((start + slope * x - y).abs().max()) > TOLERANCE:
        return None
    return start, start + slope * len(inside)
