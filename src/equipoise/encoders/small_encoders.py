"""Small encoders of images and sequences."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError, unknown_name
from ..nn.time_features import group_times, sinusoidal_times
from ..nn.transformer import Transformer, initialize_weights, learned_token
from ..tokens.masks import bool_mask, zero_masked
from ..tokens.token_batch import Tokens
from .encoder import Encoder, check_image_shape

Positions = Literal["index", "time"]


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

    With ``positions="time"``, the position embedding of a token is ``sinusoidal_times`` of its time t in seconds, the
    mean of the times of its valid frames, instead of a learned vector for its index::

        x_i = W frames_i + b + [..., sin(2 pi t_i / P_k), cos(2 pi t_i / P_k), ...],
        P_k = shortest (longest / shortest)^(k / (K - 1)),  k = 0 ... K-1,  K = dim // 2

    So positions do not depend on the frame rate, and streams of different rates share one time axis. Use times from the
    start of the recording rather than Unix timestamps. Times of masked frames are ignored. A valid frame with time NaN
    has an unknown time: it is excluded from the mean, and a token of unknown time has no position features.

    Args:
        features: features of one frame (mel bands, word-vector width, sensor channels).
        max_length: maximum sequence length in frames; not needed with ``positions="time"``, which has no limit.
        dim: token width.
        stride: frames per token; an incomplete last group is padded with zeros.
        depth: number of blocks.
        heads: attention heads.
        bias: whether the projection has a bias. ``dim=120, depth=4, heads=5, bias=False`` is the encoder of the
            published CMU-MOSEI setting, whose projection is a convolution with kernel size 1.
        dropout: dropout probability, in training only.
        positions: ``"index"``, learned positions, or ``"time"``.
        periods: with ``"time"``, shortest and longest period of the features in seconds.

    Raises:
        ConfigError: stride below 1, unknown positions, ``"index"`` without ``max_length``, periods out of order.
        ShapeError: the sequences have another width, or are longer than ``max_length``; with ``"time"``, no times.

    Returns (forward): Tokens, with ``times`` if times are given: (batch, token) seconds, NaN for the class token and
    for tokens of unknown time.

    Example:
        >>> encoder = SequenceEncoder(40, max_length=60, dim=16, stride=4, depth=1, heads=2)
        >>> encoder(torch.zeros(3, 60, 40)).values.shape
        torch.Size([3, 16, 16])
    """

    name = "SequenceEncoder"
    reads = "(frame, feature)"

    def __init__(
        self,
        features: int,
        *,
        max_length: int | None = None,
        dim: int,
        stride: int = 1,
        depth: int = 2,
        heads: int = 4,
        bias: bool = True,
        dropout: float = 0.0,
        positions: Positions = "index",
        periods: tuple[float, float] | list[float] = (0.1, 100.0),
    ) -> None:
        super().__init__()
        if stride < 1:
            raise ConfigError("SequenceEncoder", expected="stride >= 1", got=f"stride = {stride}")
        if positions not in ("index", "time"):
            raise unknown_name("SequenceEncoder", "positions", str(positions), ("index", "time"))
        if positions == "index" and max_length is None:
            raise ConfigError("SequenceEncoder", expected='max_length with positions="index"', got="None")
        if len(periods) != 2 or not 0 < periods[0] <= periods[1] < math.inf:
            raise ConfigError(
                "SequenceEncoder", expected="periods = (shortest, longest) seconds, 0 < shortest <= longest",
                got=f"{tuple(periods)}",
            )  # fmt: skip
        self.features, self.max_length, self.stride, self.dim = features, max_length, stride, dim
        self.project = nn.Linear(features * stride, dim, bias=bias)
        initialize_weights(self.project)
        self.cls = learned_token(dim)
        self.uses_times, self.periods = positions == "time", (float(periods[0]), float(periods[1]))
        if not self.uses_times:
            self.positions = learned_token(-(-(max_length or 0) // stride) + 1, dim)
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(dim, depth, heads, dropout=dropout)

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        return {"features": shape[1], "max_length": shape[0]} if len(shape) == 2 else None

    def forward(
        self,
        frames: Float[Tensor, "batch frame feature"],
        mask: Bool[Tensor, "batch frame"] | None = None,
        times: Float[Tensor, "batch frame"] | None = None,
    ) -> Tokens:
        """Encodes a batch.

        Args:
            frames: (batch, frame, feature).
            mask: (batch, frame), True for valid frames; a token is valid if any of its frames is.
            times: (batch, frame) seconds; required with ``positions="time"``.
        """
        limit = math.inf if self.uses_times or self.max_length is None else self.max_length
        if frames.ndim != 3 or frames.shape[2] != self.features or not 1 <= frames.shape[1] <= limit:
            length = "frame >= 1" if limit == math.inf else f"frame <= {limit}"
            raise ShapeError(
                "SequenceEncoder",
                got=f"shape {tuple(frames.shape)}",
                expected=f"(batch, {length}, feature = {self.features})",
                fix="" if limit == math.inf else "Cut the sequences, or build the encoder with a larger max_length.",
            )
        if self.uses_times and times is None:
            raise ShapeError(
                "SequenceEncoder", expected='times (batch, frame) in seconds, with positions="time"', got="None",
                fix="Set batch['times'] = {modality: times}, or build the encoder with positions=\"index\".",
            )  # fmt: skip
        missing = -frames.shape[1] % self.stride
        if mask is not None:
            bool_mask(
                mask, "SequenceEncoder mask", f"(batch, frame) = {tuple(frames.shape[:2])}, torch.bool",
                shape=frames.shape[:2], fix="Pass one value per frame, True = valid.",
            )  # fmt: skip
            frames = zero_masked(frames, mask)
        stamps = None if times is None else group_times(times, mask, frames.shape[:2], self.stride, "SequenceEncoder")
        if mask is not None:
            mask = nn.functional.pad(mask, (0, missing)).unflatten(1, (-1, self.stride)).any(dim=2)
            mask = torch.cat([mask.any(dim=1, keepdim=True), mask], dim=1)
        groups = nn.functional.pad(frames, (0, 0, 0, missing)).unflatten(1, (-1, self.stride)).flatten(2)
        tokens = torch.cat([self.cls.expand(len(frames), 1, -1), self.project(groups)], dim=1)
        if stamps is not None:
            stamps = nn.functional.pad(stamps, (1, 0), value=torch.nan)
        if self.uses_times:
            assert stamps is not None
            tokens = tokens + sinusoidal_times(stamps, self.dim, periods=self.periods).to(tokens.dtype)
        else:
            tokens = tokens + self.positions[: tokens.shape[1]]
        return Tokens(self.transformer(self.dropout(tokens), mask=mask), mask=mask, times=stamps, cls=True)
