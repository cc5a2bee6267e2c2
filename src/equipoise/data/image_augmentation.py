"""Loading and augmentation of small color images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ..errors import DataError
from .counter_rng import CounterRNG
from .media_files import load_image

SMALLEST, LONGEST = 8, 4.0


def load_square_image(image: str | Path | Image.Image, side: int) -> UInt8[Tensor, "side side 3"]:
    """Loads an image as an RGB square; transparent areas become white, other aspect ratios get white borders.

    Args:
        image: a file, or a Pillow image.
        side: width and height of the result, in pixels.

    Raises:
        DataError: as ``load_image``; a side below 8 pixels, or one side more than four times the other.

    Example:
        >>> load_square_image(Image.new("LA", (30, 40)), 16)[0, 0]
        tensor([255, 255, 255], dtype=torch.uint8)
    """
    colors = load_image(image)
    if min(colors.size) < SMALLEST or max(colors.size) > LONGEST * min(colors.size):
        raise DataError(
            "image" if isinstance(image, Image.Image) else f"image '{image}'",
            expected=f"at least {SMALLEST} x {SMALLEST} pixels, no side more than {LONGEST:.0f} times the other",
            got=f"width x height = {colors.width} x {colors.height}", fix="Crop it to its subject.",
        )  # fmt: skip
    longest = max(colors.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(colors, ((longest - colors.width) // 2, (longest - colors.height) // 2))
    return torch.from_numpy(np.array(square.resize((side, side), Image.Resampling.LANCZOS)))


def random_translation(
    images: Float[Tensor, "batch channel height width"], draw: CounterRNG, *, pixels: int, fill: float
) -> Float[Tensor, "batch channel height width"]:
    """Translates each image by up to ``pixels`` in both directions and pads with ``fill``.

    Example:
        >>> draw = CounterRNG(0, 0, torch.tensor([0]))
        >>> torch.equal(random_translation(torch.ones(1, 3, 4, 4), draw, pixels=0, fill=9.0), torch.ones(1, 3, 4, 4))
        True
    """
    steps = (draw.uniform("move", 2) * (2 * pixels + 1)).long()
    padded = torch.nn.functional.pad(images, (pixels,) * 4, value=fill)
    height, width = images.shape[2:]
    rows = steps[:, :1] + torch.arange(height)
    columns = steps[:, 1:] + torch.arange(width)
    sample = torch.arange(len(images))[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def color_jitter(
    images: Float[Tensor, "batch channel height width"], draw: CounterRNG, *, gain: float, tint: float
) -> Float[Tensor, "batch channel height width"]:
    """Scales the brightness of each image by up to ``gain``, and each of its color channels by up to ``tint`` more.

    Example:
        >>> draw = CounterRNG(0, 0, torch.tensor([0]))
        >>> torch.equal(color_jitter(torch.ones(1, 3, 2, 2), draw, gain=0.0, tint=0.0), torch.ones(1, 3, 2, 2))
        True
    """
    uniform = 2 * draw.uniform("tint", 1 + images.shape[1]) - 1
    factor = 1 + gain * uniform[:, :1] + tint * uniform[:, 1:]
    return images * factor[:, :, None, None]
