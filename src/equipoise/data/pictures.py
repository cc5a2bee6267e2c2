"""Small colour pictures: read from any file, and looked at from nearby places in nearby light."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import DataError
from .randomness import Draw

MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "RGBa")
"""Of eight bits or fewer for each colour; what more bits mean the file does not say."""
SMALLEST, LONGEST = 8, 4.0


def read_picture(picture: str | Path | Image.Image, side: int) -> UInt8[Tensor, "side side 3"]:
    """A picture as a square of colours: on white where it is transparent, with white borders where it is no square.

    Args:
        picture: a file, or what Pillow opened.
        side: pixels.

    Raises:
        DataError: no picture or a part of one; more than eight bits a colour; fewer than 8 pixels a side, or one side
            more than four times the other.

    Example:
        >>> read_picture(Image.new("LA", (30, 40)), 16)[0, 0]
        tensor([255, 255, 255], dtype=torch.uint8)
    """
    who, image = _opened(picture)
    if image.mode not in MODES:
        raise DataError(
            who, expected=f"a picture of mode RGB, or one of {', '.join(MODES[1:])}", got=f"mode {image.mode}",
            fix="Convert it to 8-bit RGB first.",
        )  # fmt: skip
    if min(image.size) < SMALLEST or max(image.size) > LONGEST * min(image.size):
        raise DataError(
            who, expected=f"at least {SMALLEST} x {SMALLEST} pixels, no side more than {LONGEST:.0f} times the other",
            got=f"width x height = {image.width} x {image.height}", fix="Cut it to what it shows.",
        )  # fmt: skip
    colours = image.convert("RGBA")
    longest = max(colours.size)
    square = Image.new("RGBA", (longest, longest), "white")
    square.alpha_composite(colours, ((longest - colours.width) // 2, (longest - colours.height) // 2))
    small = square.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small))


def _opened(picture: str | Path | Image.Image) -> tuple[str, Image.Image]:
    if isinstance(picture, Image.Image):
        return "picture", picture
    who = f"picture '{picture}'"
    try:
        with Image.open(picture) as opened:
            opened.load()
            # Cameras store how they were held, and turn nothing.
            return who, ImageOps.exif_transpose(opened)
    except FileNotFoundError as error:
        raise DataError(who, expected="a picture", got="no such file") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(
            who, expected="a whole picture, as PNG, JPEG, WebP or the like", got=" ".join(str(error).split())[:120],
            fix="Is it cut off, or a file of another kind?",
        ) from error  # fmt: skip


def moved(
    pictures: Float[Tensor, "batch channel height width"], draw: Draw, *, pixels: int, fill: float
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


def tinted(
    pictures: Float[Tensor, "batch channel height width"], draw: Draw, *, gain: float, tint: float
) -> Float[Tensor, "batch channel height width"]:
    """Each picture brighter or darker by up to ``gain``, and each of its colours by up to ``tint`` more.

    Example:
        >>> draw = Draw(0, 0, torch.tensor([0]))
        >>> torch.equal(tinted(torch.ones(1, 3, 2, 2), draw, gain=0.0, tint=0.0), torch.ones(1, 3, 2, 2))
        True
    """
    dice = 2 * draw.uniform("tint", 1 + pictures.shape[1]) - 1
    factor = 1 + gain * dice[:, :1] + tint * dice[:, 1:]
    return pictures * factor[:, :, None, None]
