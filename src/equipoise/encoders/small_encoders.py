"""Small encoders of images and sequences."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..nn.transformer import Transformer, initialize_weights, learned_token
from ..tokens.masks import bool_mask, zero_masked
from ..tokens.token_batch import Tokens
from .encoder import Encoder, check_image_shape


class PatchEncoder(Encoder):
    """A small ViT: patches, class token, learned positions, pre-norm blocks, final LayerNorm.

    With ``dim=768, depth=4, heads=12, patch=16`` it has the blocks of the RollingQ paper; ``ViTEncoder`` is the paper's
    complete encoder, with frames and pretrained weights.

    Args:
        channels: image channels (1 for a spectrogram).
        size: (height, width) of the image in pixels.
        patch: side of a patch in pixels; height and width must be multiples of it.
        dim: token width.
        depth: number of blocks.
        heads: attention heads.
        dropout: dropout probability, in training only.

    Raises:
        ConfigError: the size is not a multiple of the patch.
        ShapeError: the shape of the images does not match ``size``.

    Example:
        >>> PatchEncoder(1, (8, 8), patch=2, dim=16, depth=1, heads=2)(torch.zeros(3, 1, 8, 8)).values.shape
        torch.Size([3, 17, 16])
    """

    name = "PatchEncoder"
    reads = "(channel, height, width)"

    def __init__(
        self, channels: int, size: tuple[int, int], *, patch: int, dim: int, depth: int = 2, heads: int = 4,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        height, width = size
        if patch < 1 or height % patch or width % patch:
            raise ConfigError(
                "PatchEncoder",
                expected=f"a patch that divides (height, width) = {(height, width)}",
                got=f"patch = {patch}",
                fix="Choose a common divisor, or crop or pad the images.",
            )
        self.channels, self.size, self.dim = channels, (height, width), dim
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.cls = learned_token(dim)
        self.positions = learned_token((height // patch) * (width // patch) + 1, dim)
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(dim, depth, heads, dropout=dropout)

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        return {"channels": shape[0], "size": shape[1:]} if len(shape) == 3 else None

    def forward(self, pixels: Float[Tensor, "batch channel height width"]) -> Tokens:
        check_image_shape(pixels, (self.channels, *self.size), "PatchEncoder")
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(pixels), 1, -1), patches], dim=1) + self.positions
        return Tokens(self.transformer(self.dropout(tokens)), cls=True)


class SequenceEncoder(Encoder):
    """Transformer over feature frames: groups of ``stride`` frames are projected; class token and positions are added.

    Args:
        features: features of one frame (mel bands, word-vector width, sensor channels).
        max_length: maximum sequence length in frames.
        dim: token width.
        stride: frames per token; an incomplete last group is padded with zeros.
        depth: number of blocks.
        heads: attention heads.
        bias: whether the projection has a bias. ``dim=120, depth=4, heads=5, bias=False`` is the encoder of the
            published CMU-MOSEI setting, whose projection is a convolution with kernel size 1.
        dropout: dropout probability, in training only.

    Raises:
        ShapeError: the sequences have another width, or are longer than ``max_length``.

    Example:
        >>> encoder = SequenceEncoder(40, max_length=60, dim=16, stride=4, depth=1, heads=2)
        >>> encoder(torch.zeros(3, 60, 40)).values.shape
        torch.Size([3, 16, 16])
    """

    name = "SequenceEncoder"
    reads = "(frame, feature)"

    def __init__(
        self, features: int, *, max_length: int, dim: int, stride: int = 1, depth: int = 2, heads: int = 4,
        bias: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if stride < 1:
            raise ConfigError("SequenceEncoder", expected="stride >= 1", got=f"stride = {stride}")
        self.features, self.max_length, self.stride, self.dim = features, max_length, stride, dim
        self.project = nn.Linear(features * stride, dim, bias=bias)
        initialize_weights(self.project)
        self.cls = learned_token(dim)
        self.positions = learned_token(-(-max_length // stride) + 1, dim)
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(dim, depth, heads, dropout=dropout)

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        return {"features": shape[1], "max_length": shape[0]} if len(shape) == 2 else None

    def forward(
        self, frames: Float[Tensor, "batch frame feature"], mask: Bool[Tensor, "batch frame"] | None = None
    ) -> Tokens:
        """Encodes a batch. ``mask`` is True for valid frames; a token is valid if any of its frames is."""
        if frames.ndim != 3 or frames.shape[2] != self.features or not 1 <= frames.shape[1] <= self.max_length:
            raise ShapeError(
                "SequenceEncoder",
                got=f"shape {tuple(frames.shape)}",
                expected=f"(batch, frame <= {self.max_length}, feature = {self.features})",
                fix="Cut the sequences, or build the encoder with a larger max_length.",
            )
        missing = -frames.shape[1] % self.stride
        if mask is not None:
            bool_mask(
                mask, "SequenceEncoder mask", f"(batch, frame) = {tuple(frames.shape[:2])}, torch.bool",
                shape=frames.shape[:2], fix="Pass one value per frame, True = valid.",
            )  # fmt: skip
            frames = zero_masked(frames, mask)
            mask = nn.functional.pad(mask, (0, missing)).unflatten(1, (-1, self.stride)).any(dim=2)
            mask = torch.cat([mask.any(dim=1, keepdim=True), mask], dim=1)
        groups = nn.functional.pad(frames, (0, 0, 0, missing)).unflatten(1, (-1, self.stride)).flatten(2)
        tokens = torch.cat([self.cls.expand(len(frames), 1, -1), self.project(groups)], dim=1)
        tokens = tokens + self.positions[: tokens.shape[1]]
        return Tokens(self.transformer(self.dropout(tokens), mask=mask), mask=mask, cls=True)
