"""Base class of the encoders that recipes can name."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import ShapeError
from ..io.recorded_options import RecordedOptions


class Encoder(RecordedOptions, nn.Module):
    """Base class of the encoders that recipes can name. Models accept any module that returns tokens.

    Attributes:
        dim: token width.
        reads: description of the supported sample shapes, for error messages.
        takes_ids: True if inputs are integer ids below a ``vocabulary``, False if they are not, None if both are
            possible.
    """

    dim: int
    reads: ClassVar[str] = ""
    takes_ids: ClassVar[bool | None] = False

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        """Returns the constructor arguments for samples of a shape, or None if the shape is not supported."""
        return None


def check_image_shape(pixels: Tensor, expected: tuple[int, ...], who: str) -> None:
    """Raises ShapeError unless the shape is (batch, *expected), with expected = (channel, height, width)."""
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
        raise ShapeError(
            who, expected=f"(batch, channel, height, width) = (batch, {', '.join(map(str, expected))})",
            got=f"shape {tuple(pixels.shape)}", fix="Resize the images, or create the encoder for their size.",
        )  # fmt: skip
