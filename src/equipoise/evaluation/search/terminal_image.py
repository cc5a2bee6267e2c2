"""Renders images in a terminal: each character shows two pixels as its foreground and background color."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from PIL import Image
from rich.color import Color
from rich.segment import Segment, Segments
from rich.style import Style
from torch import Tensor

HALF = "\N{UPPER HALF BLOCK}"


def image_to_blocks(image: UInt8[Tensor, "height width 3"], columns: int = 16) -> Segments:
    """Renders a square image as colored half blocks, ``columns`` characters wide and half as many lines high.

    Example:
        >>> drawn = image_to_blocks(torch.full((4, 4, 3), 255, dtype=torch.uint8), columns=2)
        >>> "".join(segment.text for segment in drawn.segments)
        '▀▀\\n'
    """
    side = columns + columns % 2
    resized = Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(side, side, 3).tolist()
    segments: list[Segment] = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for foreground, background in zip(upper, lower, strict=True):
            style = Style(color=Color.from_rgb(*foreground), bgcolor=Color.from_rgb(*background))
            segments.append(Segment(HALF, style))
        segments.append(Segment.line())
    return Segments(segments)
