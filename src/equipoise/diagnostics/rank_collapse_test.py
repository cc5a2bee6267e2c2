"""Rank collapse: relative norm of the tokens of each layer after subtracting their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..geometry import membership
from .model_inputs import Layers, hidden_of, labels_of, token_mask

Norm = Literal["frobenius", "composite"]


@dataclass(frozen=True, eq=False)
class RankCollapse:
    """Relative residuals of the tokens of each layer, on the CPU.

    Attributes:
        whole: (layer, sample) residual over all valid tokens, including special tokens.
        per_modality: (layer, sample, modality) residual over the tokens of one modality, without special tokens and
            padding; NaN if a sample has none. None without labels.
    """

    whole: Float[Tensor, "layer sample"]
    per_modality: Float[Tensor, "layer sample modality"] | None = None


def residual(
    tokens: Float[Tensor, "*batch token dim"], mask: Bool[Tensor, "*batch token"] | None = None
) -> Float[Tensor, "*batch token dim"]:
    """Subtracts the mean token: res(X) = X - 1 x, with x the mean of the valid tokens.

    Args:
        tokens: (..., token, dim).
        mask: (..., token), True = valid; all without it.

    Returns:
        (..., token, dim) in at least float32; zeros for invalid tokens, and exactly zero if all tokens are equal.

    Raises:
        ShapeError: no token, an integer tensor, or a mask that does not fit.

    Example:
        >>> residual(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        tensor([[-1.,  0.],
                [ 1.,  0.]])
    """
    if tokens.ndim < 2 or not tokens.is_floating_point() or 0 in tokens.shape[-2:]:
        raise ShapeError(
            "residual",
            expected="a float tensor of shape (..., token, dim) with tokens",
            got=f"shape {tuple(tokens.shape)}, {tokens.dtype}",
        )
    valid = torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask is None else mask
    if valid.shape != tokens.shape[:-1] or valid.dtype != torch.bool:
        raise ShapeError(
            "residual mask",
            expected=f"dtype torch.bool and shape (..., token) = {tuple(tokens.shape[:-1])}",
            got=f"shape {tuple(valid.shape)}, {valid.dtype}",
        )
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    # Subtract one of the tokens first, so that the result is exactly zero if all tokens are equal.
    first = valid.int().argmax(dim=-1)[..., None, None].expand(*tokens.shape[:-2], 1, tokens.shape[-1])
    moved = (tokens - tokens.gather(-2, first)).masked_fill(~valid[..., None], 0.0)
    mean = moved.sum(dim=-2, keepdim=True) / valid.sum(dim=-1).clamp(min=1)[..., None, None]
    return (moved - mean).masked_fill(~valid[..., None], 0.0)


def rank_collapse(
    hidden: Layers,
    *,
    mask: Bool[Tensor, "batch token"] | None = None,
    modality: Int[Tensor, "... token"] | None = None,
    num_modalities: int | None = None,
    norm: Norm = "frobenius",
) -> RankCollapse:
    """Computes the relative residual ||res(X)|| / ||X|| of each layer: 0 if all tokens are equal.

    ::

        "frobenius"   ||Y|| = sqrt(sum_ij Y_ij^2)                     values in [0, 1]
        "composite"   ||Y|| = sqrt(max_j sum_i |Y_ij|  max_i sum_j |Y_ij|)   norm of the theorem in the paper

    Attention without skip connections and MLPs drives it to 0 doubly exponentially with depth. A decrease to nearly 0
    along the layers means that the tokens have collapsed to one vector. It does not measure ranks above one, and it is
    also small if all tokens share one large common component, as in many language models.

    Args:
        hidden: (batch, token, dim), or one for each layer; widths may differ between layers.
        mask: (batch, token), True = valid.
        modality: labels (token,) or (batch, token), -1 = special or padding; adds the residuals of each modality.
        num_modalities: by default the highest label + 1.
        norm: "frobenius" or "composite". Both subtract the mean, which minimizes only the Frobenius norm.

    Returns:
        RankCollapse. A zero tensor has residual 0; a sample without tokens and an empty modality have NaN.

    Raises:
        ConfigError: an unknown norm. ShapeError: hidden states, mask or labels do not fit.

    Reference: Dong et al., "Attention Is Not All You Need" (ICML 2021).
    Differs from the paper in: the residual is relative to the norm of the layer, and also computed for each modality.

    Example:
        >>> hidden = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [0.0, 4.0]]])
        >>> rank_collapse(hidden, modality=torch.tensor([0, 0, 1])).per_modality
        tensor([[[0., 0.]]])
        >>> rank_collapse(hidden).whole
        tensor([[0.7001]])
    """
    if norm not in SIZES:
        raise ConfigError("rank_collapse", expected="norm 'frobenius' or 'composite'", got=repr(norm))
    layers = hidden_of(hidden, "rank_collapse")
    valid = token_mask(mask, layers[0], "rank_collapse")
    whole = torch.stack([_relative(layer, valid.to(layer.device), norm).cpu() for layer in layers])
    if modality is None:
        return RankCollapse(whole)
    labels, count = labels_of(modality, num_modalities, *valid.shape, who="rank_collapse")
    member = membership(labels.to(valid.device), count, len(valid), valid)
    parts = []
    for layer in layers:
        copies = layer[:, None].expand(-1, count, -1, -1)
        parts.append(_relative(copies, member.to(layer.device), norm).cpu())
    return RankCollapse(whole, torch.stack(parts))


def _relative(tokens: Tensor, mask: Tensor, norm: Norm) -> Tensor:
    size = SIZES[norm](tokens.masked_fill(~mask[..., None], 0.0))
    ratio = SIZES[norm](residual(tokens, mask)) / size
    return ratio.masked_fill(size == 0, 0.0).masked_fill(~mask.any(dim=-1), torch.nan)


def _frobenius(values: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(values)


def _composite(values: Tensor) -> Tensor:
    columns, rows = values.abs().sum(dim=-2).amax(dim=-1), values.abs().sum(dim=-1).amax(dim=-1)
    return columns.sqrt() * rows.sqrt()


SIZES = {"frobenius": _frobenius, "composite": _composite}
