"""Inputs of any kind as frames, with the valid frames first, so that corruptions need not handle masks and layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ...errors import ConfigError, ShapeError, unknown_name

InputKind = Literal["sequence", "spectrogram", "image", "vector", "tokens"]
KINDS: dict[str, str] = {
    "sequence": "a floating tensor (batch, time, ...)",
    "spectrogram": "a floating tensor (batch, ..., frequency, time)",
    "image": "a floating tensor (batch, ..., height, width)",
    "vector": "a floating tensor (batch, feature)",
    "tokens": "an integer tensor (batch, token), 0 = padding",
}
"""Kind of input -> its type and shape."""

FRAME_AXIS = {"spectrogram": -1, "image": -2}


def infer_kind(values: Tensor, who: str = "infer_kind") -> InputKind:
    """Returns the kind of an input by its type and shape.

    Integers (batch, token) are tokens; (batch, feature) is a vector, (batch, time, feature) a sequence and (batch,
    channel, height, width) an image. Spectrograms have the shape of sequences or images: name their kind explicitly.

    Raises:
        ShapeError: another type or number of dimensions.

    Example:
        >>> infer_kind(torch.zeros(2, 7, 3)), infer_kind(torch.zeros(2, 7, dtype=torch.long))
        ('sequence', 'tokens')
    """
    by_rank: dict[int, InputKind] = {2: "vector", 3: "sequence", 4: "image"}
    if isinstance(values, Tensor):
        integers = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
        if integers and values.ndim == 2:
            return "tokens"
        if values.is_floating_point() and values.ndim in by_rank:
            return by_rank[values.ndim]
    raise ShapeError(
        who, expected="; ".join(f"{text} ({kind})" for kind, text in KINDS.items()),
        got=f"shape {tuple(values.shape)}, {values.dtype}" if isinstance(values, Tensor) else type(values).__name__,
        fix="Pass the kind of the input where its shape does not determine it.",
    )  # fmt: skip


def check_kind(values: Tensor, kind: str, who: str) -> None:
    """Checks that an input has the type and number of dimensions of its kind.

    Raises:
        ConfigError: an unknown kind. ShapeError: another type or shape.
    """
    if kind not in KINDS:
        raise unknown_name(who, "kind of input", str(kind), KINDS)
    least = {"image": 3, "spectrogram": 3}.get(kind, 2)
    tensor = isinstance(values, Tensor)
    fits = tensor and values.ndim >= least and values.is_floating_point() == (kind != "tokens")
    if fits and kind in ("vector", "tokens"):
        fits = values.ndim == 2 and not values.is_complex() and values.dtype != torch.bool
    if not fits:
        got = f"shape {tuple(values.shape)}, {values.dtype}" if tensor else type(values).__name__
        raise ShapeError(who, expected=f"{KINDS[kind]} for the kind '{kind}'", got=got)


@dataclass(frozen=True, eq=False)
class InputFrames:
    """A batch of inputs as frames: steps in time, rows of an image, features of a vector, or tokens.

    Attributes:
        values: (batch, frame, ...); the first ``count`` frames of each sample are valid, the others are 0.
        count: (batch,) number of valid frames.
        kind: of the input.
        mean, std: of the training inputs.
        random: CPU generator of all random numbers.
    """

    values: Tensor
    count: Int[Tensor, " batch"]
    kind: str
    mean: float
    std: float
    random: torch.Generator

    @property
    def size(self) -> tuple[int, int]:
        """(batch, frame)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def valid(self) -> Bool[Tensor, "batch frame"]:
        """True for the valid frames."""
        return self.position < self.count[:, None]

    @property
    def position(self) -> Int[Tensor, "1 frame"]:
        """Index of each frame."""
        return torch.arange(self.size[1], device=self.values.device)[None]

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal numbers; of the shape of the values by default."""
        return torch.randn(shape or tuple(self.values.shape), generator=self.random).to(self.values)

    def uniform(self, *shape: int) -> Tensor:
        """Returns uniform numbers in [0, 1)."""
        return torch.rand(shape, generator=self.random).to(self.values.device)

    def expand(self, tensor: Tensor) -> Tensor:
        """Reshapes (batch,) or (batch, frame) so that it broadcasts with the values."""
        return tensor.reshape(*tensor.shape, *[1] * (self.values.ndim - tensor.ndim))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the valid values of each sample, both (batch, 1, ...)."""
        axes = tuple(range(1, self.values.ndim))
        each = self.values[0, 0].numel()
        number = self.expand(self.count * each).clamp(min=1)
        mean = self.values.sum(axes, keepdim=True) / number
        squares = (self.values - mean).masked_fill(~self.expand(self.valid), 0).square()
        return mean, (squares.sum(axes, keepdim=True) / number).sqrt()

    def region(self, extent: float) -> Bool[Tensor, "batch frame ..."]:
        """Returns a random contiguous part of each sample: a span of frames, a rectangle of an image, single features.

        Args:
            extent: fraction of the valid values; 1 selects all of them.
        """
        if self.kind == "vector":
            return self.chosen(extent)
        share = extent**0.5 if self.kind == "image" else extent
        rows = self.expand(self._span(self.count, self.size[1], share))
        if self.kind != "image":
            return rows
        width = self.values.shape[-1]
        columns = self._span(torch.full_like(self.count, width), width, share)
        return rows & columns.reshape(len(columns), *[1] * (self.values.ndim - 2), width)

    def _span(self, count: Tensor, size: int, extent: float) -> Bool[Tensor, "batch position"]:
        length = (extent * count).ceil()
        start = (self.uniform(len(count)) * (count - length + 1)).floor()
        position = torch.arange(size, device=count.device)[None]
        return (position >= start[:, None]) & (position < (start + length)[:, None])

    def chosen(self, fraction: float) -> Bool[Tensor, "batch frame"]:
        """Returns a random subset of the valid frames: ``fraction`` of them, rounded up."""
        drawn = self.uniform(*self.size).masked_fill(~self.valid, 2.0)
        rank = drawn.argsort(dim=1, stable=True).argsort(dim=1)
        return rank < (fraction * self.count).ceil()[:, None]


def to_frames(
    values: Tensor, kind: str, mask: Tensor | None, statistics: tuple[float, float], random: torch.Generator
) -> tuple[InputFrames, Int[Tensor, "batch frame"]]:
    """Converts an input to frames.

    Args:
        values: input of a modality.
        kind: of the input.
        mask: (batch,), or (batch, frame) for the valid frames; None if all are valid. A mask of another size counts by
            sample: it masks tokens that the encoder creates.
        statistics: (mean, std) of the training inputs.
        random: CPU generator.

    Returns:
        The frames, and the (batch, frame) positions that they had in the input.
    """
    frames = values.movedim(FRAME_AXIS[kind], 1) if kind in FRAME_AXIS else values
    valid = frame_mask(frames, kind, mask)
    order = torch.argsort(~valid, dim=1, stable=True)
    packed = _gather(frames, order)
    count = valid.sum(dim=1)
    hidden = torch.arange(frames.shape[1], device=values.device)[None] >= count[:, None]
    packed = packed.masked_fill(hidden.reshape(*hidden.shape, *[1] * (packed.ndim - 2)), 0)
    return InputFrames(packed, count, kind, *statistics, random), order


def from_frames(result: Tensor, original: Tensor, frames: InputFrames, order: Int[Tensor, "batch frame"]) -> Tensor:
    """Converts frames back to the layout of the input; invalid frames get their original values."""
    axis = FRAME_AXIS.get(frames.kind)
    before = original if axis is None else original.movedim(axis, 1)
    back = order.argsort(dim=1)
    valid = frames.expand(frames.valid)
    merged = torch.where(valid, result.to(original.dtype), _gather(before, order))
    restored = _gather(merged, back)
    return restored if axis is None else restored.movedim(1, axis)


def frame_mask(frames: Tensor, kind: str, mask: Tensor | None) -> Bool[Tensor, "batch frame"]:
    """Returns which frames are valid; ids of 0 are padding."""
    if mask is None:
        valid = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
    else:
        mask = mask.bool().to(frames.device)
        if mask.shape != frames.shape[:2] or kind in ("image", "vector"):
            mask = mask.flatten(1).any(dim=1) if mask.ndim > 1 else mask
            mask = mask[:, None].expand(frames.shape[:2])
        valid = mask
    return valid & (frames > 0) if kind == "tokens" else valid


def check_statistics(statistics: tuple[float, float], who: str) -> tuple[float, float]:
    """Checks (mean, standard deviation) of the training inputs.

    Raises:
        ConfigError: not two finite numbers, or a negative deviation.
    """
    try:
        mean, std = (float(value) for value in statistics)
    except (TypeError, ValueError):
        mean, std = float("nan"), float("nan")
    if not (abs(mean) < float("inf") and 0 <= std < float("inf")):
        raise ConfigError(
            who, expected="statistics = (mean, std), two finite numbers with std >= 0", got=repr(statistics)
        )
    return mean, std


def _gather(values: Tensor, index: Int[Tensor, "batch frame"]) -> Tensor:
    index = index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)
