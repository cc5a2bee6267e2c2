"""Pictures in a terminal: two pixels in a character, by the colors of the upper half and its ground."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from PIL import Image
from rich.color import Color
from rich.segment import Segment, Segments
from rich.style import Style
from torch import Tensor

HALF = "\N{UPPER HALF BLOCK}"


def image_to_blocks(picture: UInt8[Tensor, "height width 3"], columns: int = 16) -> Segments:
    """The picture as colored half blocks, square, ``columns`` characters wide and half as many lines.

    Example:
        >>> drawn = blocks(torch.full((4, 4, 3), 255, dtype=torch.uint8), columns=2)
        >>> "".join(segment.text for segment in drawn.segments)
        '▀▀\\n'
    """
    side = columns + columns % 2
    image = Image.fromarray(picture.numpy()).resize((side, side), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(side, side, 3).tolist()
    segments: list[Segment] = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper, lower, strict=True):
            style = Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
            segments.append(Segment(HALF, style))
        segments.append(Segment.line())
    return Segments(segments)
