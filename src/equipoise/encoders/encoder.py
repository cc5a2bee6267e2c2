"""What an encoder of ours says about itself; a model takes any module that returns tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import ShapeError


class Encoder(nn.Module):
    """Base of the encoders that recipes know by name. A model needs no base class: any module will do.

    Attributes:
        dim: width of its tokens.
        reads: shapes of a sample that it can encode, in words, for error messages.
    """

    dim: int
    reads: ClassVar[str] = ""

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        """The constructor's arguments that follow from the shape of one sample; None where it cannot be encoded."""
        return None


def check_image_shape(pixels: Tensor, expected: tuple[int, ...], who: str) -> None:
    """Raises ShapeError for anything but (batch, *expected), expected being (channel, height, width)."""
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
        raise ShapeError(
            who, expected=f"(batch, channel, height, width) = (batch, {', '.join(map(str, expected))})",
            got=f"shape {tuple(pixels.shape)}", fix="Resize the pictures, or build the encoder for their size.",
        )  # fmt: skip
