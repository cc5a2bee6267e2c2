"""A small convolutional network that returns its last feature map as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..tokens.token_batch import Tokens
from .encoder import Encoder, check_image_shape


class ConvEncoder(Encoder):
    """Convolutional encoder: residual stages that each halve the resolution; each position of the last map is a token.

    ::

        M_0 = image,   M_i = R(C_i M_{i-1})          C_i: 3 x 3, stride 2;   R(x) = x + C GELU(N(C' GELU(N(x))))
        tokens = GELU(N(M_S)) A + a                     N: GroupNorm

    For small images and a few thousand samples it converges faster than a patch encoder. Group norms do not depend on
    other samples, so that accumulated small batches are equivalent to one large batch.

    Args:
        channels: image channels.
        size: (height, width) of the image in pixels.
        dim: token width.
        widths: channels of each stage.
        dropout: dropout probability of channels of the last map, in training only.

    Raises:
        ConfigError: widths are empty or not multiples of the number of groups (8).
        ShapeError: the shape of the images does not match ``size``.

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
"""Number of groups of a GroupNorm."""


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
