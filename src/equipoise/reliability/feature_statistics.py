"""Features of one modality of a sample, from which its distance to the training data is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ShapeError
from ..tokens.masks import at_least_float32, zero_masked
from ..tokens.token_batch import Tokens

BINS = 32
"""Number of bins of the histogram of token ids."""


def token_features(tokens: Tokens) -> Float[Tensor, "batch feature"]:
    """Returns mean and standard deviation over the valid tokens of each sample; 0 for samples without tokens.

    Example:
        >>> token_features(Tokens(torch.tensor([[[1.0], [3.0]]])))
        tensor([[2., 1.]])
    """
    return torch.cat(_mean_and_std(at_least_float32(tokens.values), tokens.mask), dim=1)


def input_features(value: Any, mask: Tensor | None, who: str) -> Float[Tensor, "batch feature"]:
    """Returns statistics of the raw input of a modality, over its valid parts.

    Sequences (batch, time, ...): mean, standard deviation and mean absolute difference of consecutive frames of each
    feature. Images (batch, ..., height, width): the same of each channel, with differences along both axes. Vectors:
    the vector. Token ids: the logarithm of their number, and a histogram. Mappings: the features of all their tensors.

    Raises:
        ShapeError: the input contains no tensor.
    """
    if isinstance(value, Mapping):
        parts = [
            input_features(part, mask, who) for part in value.values() if isinstance(part, Tensor) and part.ndim > 1
        ]
        if parts:
            return torch.cat(parts, dim=1)
    if not isinstance(value, Tensor) or value.ndim < 2:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(who, expected="a tensor (batch, ...) for distance='input'", got=got)
    valid = _valid(value, mask)
    if not value.is_floating_point():
        return _id_features(value, valid)
    values = at_least_float32(value)
    if values.ndim == 2:
        return zero_masked(values, valid.any(dim=1))
    if values.ndim == 3:
        steps = (values[:, 1:] - values[:, :-1]).abs()
        mean, std = _mean_and_std(values, valid)
        return torch.cat([mean, std, _mean_and_std(steps, valid[:, 1:] & valid[:, :-1])[0]], dim=1)
    values = zero_masked(values.flatten(1), valid.any(dim=1)).view_as(values)
    down, across = values.diff(dim=-2).abs().mean(dim=(-2, -1)), values.diff(dim=-1).abs().mean(dim=(-2, -1))
    parts = [values.mean(dim=(-2, -1)), values.std(dim=(-2, -1), correction=0), down, across]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _id_features(ids: Tensor, valid: Bool[Tensor, "batch token"]) -> Tensor:
    ids = ids.flatten(1)
    valid = (valid if valid.shape == ids.shape else valid.any(dim=1, keepdim=True)) & (ids != 0)
    count = valid.sum(dim=1, keepdim=True)
    histogram = torch.zeros(len(ids), BINS, device=ids.device)
    histogram.scatter_add_(1, ids.long() % BINS, valid.float().expand(ids.shape))
    return torch.cat([torch.log1p(count.float()), histogram / count.clamp(min=1)], dim=1)


def _valid(value: Tensor, mask: Tensor | None) -> Bool[Tensor, "batch frame"]:
    if mask is None:
        return torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
    mask = mask.bool().to(value.device)
    if mask.shape != value.shape[:2] or value.ndim > 3:
        mask = (mask.flatten(1).any(dim=1) if mask.ndim > 1 else mask)[:, None]
    return mask.expand(value.shape[:2])


def _mean_and_std(
    values: Float[Tensor, "batch token dim"], valid: Bool[Tensor, "batch token"] | None
) -> tuple[Tensor, Tensor]:
    values = zero_masked(values, valid)
    count: Any = max(values.shape[1], 1) if valid is None else valid.sum(dim=1, keepdim=True).clamp(min=1)
    mean = values.sum(dim=1) / count
    squares = zero_masked(values - mean[:, None], valid).square().sum(dim=1) / count
    # The gradient of the square root is infinite at 0, the value for a single token.
    return mean, squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt().masked_fill(squares == 0, 0.0)
