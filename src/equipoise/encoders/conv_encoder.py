"""A small convolutional network: a picture's last feature map as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..tokens.token_batch import Tokens
from .encoder import Encoder, check_image_shape


class ConvEncoder(Encoder):
    """Residual stages that each halve the picture; every place of the last map is a token.

    ::

        M_0 = picture,   M_i = R(C_i M_{i-1})          C_i: 3 x 3, stride 2;   R(x) = x + C GELU(N(C' GELU(N(x))))
        tokens = GELU(N(M_S)) A + a                     N: GroupNorm

    For pictures of a few thousand pixels and some thousand examples it learns faster than patches do. Norms are of one
    sample alone, so that accumulated small batches are one large batch.

    Args:
        channels: of the picture.
        size: (height, width) of the picture in pixels.
        dim: token width.
        widths: channels of the stages; as many as halve the picture.
        dropout: of whole channels of the last map, in training only.

    Raises:
        ConfigError: no stage, or widths that the eight groups of a norm do not divide.
        ShapeError: pictures of another shape than ``size`` says.

    Example:
        >>> import torch
        >>> ConvEncoder(3, (32, 32), dim=16, widths=(8, 16))(torch.zeros(2, 3, 32, 32)).values.shape
        torch.Size([2, 64, 16])
    """

    name = "ConvEncoder"
    reads = "(channel, height, width)"

    def __init__(
        self, channels: int, size: tuple[int, int], *, dim: int, widths: Sequence[int] = (32, 64, 128),
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not widths or any(width < GROUPS or width % GROUPS for width in widths):
            raise ConfigError("ConvEncoder", expected=f"one or more widths, multiples of {GROUPS}", got=f"{widths}")
        self.channels, self.size, self.dim = channels, tuple(size), dim
        stages: list[nn.Module] = []
        for before, width in zip([channels, *widths[:-1]], widths, strict=True):
            stages += [nn.Conv2d(before, width, 3, stride=2, padding=1), _Residual(width)]
        self.stages = nn.Sequential(*stages)
        self.norm = nn.GroupNorm(GROUPS, widths[-1])
        self.dropout = nn.Dropout2d(dropout)
        self.project = nn.Linear(widths[-1], dim)

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        return {"channels": shape[0], "size": shape[1:]} if len(shape) == 3 else None

    def forward(self, pixels: Float[Tensor, "batch channel height width"]) -> Tokens:
        check_image_shape(pixels, (self.channels, *self.size), "ConvEncoder")
        last = self.dropout(nn.functional.gelu(self.norm(self.stages(pixels))))
        return Tokens(self.project(last.flatten(2).transpose(1, 2)))


GROUPS = 8
"""Of a norm."""


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(nn.functional.gelu(norm(y)))
        return x + y
