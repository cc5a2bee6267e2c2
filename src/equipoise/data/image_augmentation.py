"""Small color pictures: read from any file, and looked at from nearby places in nearby light."""

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


def load_square_image(picture: str | Path | Image.Image, side: int) -> UInt8[Tensor, "side side 3"]:
    """A picture as a square of colors: on white where it is transparent, with white borders where it is no square.

    Args:
        picture: a file, or what Pillow opened.
        side: pixels.

    Raises:
        DataError: what ``media.read_image`` refuses; fewer than 8 pixels a side, or one side more than four times the
            other.

    Example:
        >>> read_picture(Image.new("LA", (30, 40)), 16)[0, 0]
        tensor([255, 255, 255], dtype=torch.uint8)
    """
    colors = load_image(picture)
    if min(colors.size) < SMALLEST or max(colors.size) > LONGEST * min(colors.size):
        raise DataError(
            "image" if isinstance(picture, Image.Image) else f"image '{picture}'",
            expected=f"at least {SMALLEST} x {SMALLEST} pixels, no side more than {LONGEST:.0f} times the other",
            got=f"width x height = {colors.width} x {colors.height}", fix="Cut it to what it shows.",
        )  # fmt: skip
    longest = max(colors.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(colors, ((longest - colors.width) // 2, (longest - colors.height) // 2))
    return torch.from_numpy(np.array(square.resize((side, side), Image.Resampling.LANCZOS)))


def random_translation(
    pictures: Float[Tensor, "batch channel height width"], draw: CounterRNG, *, pixels: int, fill: float
) -> Float[Tensor, "batch channel height width"]:
    """Each picture moved by up to so many pixels up or down and left or right; what comes in is ``fill``.

    Example:
        >>> draw = Draw(0, 0, torch.tensor([0]))
        >>> torch.equal(moved(torch.ones(1, 3, 4, 4), draw, pixels=0, fill=9.0), torch.ones(1, 3, 4, 4))
        True
    """
    steps = (draw.uniform("move", 2) * (2 * pixels + 1)).long()
    padded = torch.nn.functional.pad(pictures, (pixels,) * 4, value=fill)
    height, width = pictures.shape[2:]
    rows = steps[:, :1] + torch.arange(height)
    columns = steps[:, 1:] + torch.arange(width)
    sample = torch.arange(len(pictures))[:, None, None, None]
    channel = torch.arange(pictures.shape[1])[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def color_jitter(
    pictures: Float[Tensor, "batch channel height width"], draw: CounterRNG, *, gain: float, tint: float
) -> Float[Tensor, "batch channel height width"]:
    """Each picture brighter or darker by up to ``gain``, and each of its colors by up to ``tint`` more.

    Example:
        >>> draw = Draw(0, 0, torch.tensor([0]))
        >>> torch.equal(tinted(torch.ones(1, 3, 2, 2), draw, gain=0.0, tint=0.0), torch.ones(1, 3, 2, 2))
        True
    """
    dice = 2 * draw.uniform("tint", 1 + pictures.shape[1]) - 1
    factor = 1 + gain * dice[:, :1] + tint * dice[:, 1:]
    return pictures * factor[:, :, None, None]
