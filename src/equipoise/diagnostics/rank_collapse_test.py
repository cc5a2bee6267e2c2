"""Do the tokens become alike with depth? The part of a layer that is not the mean token (spec 5.6)."""

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
    """How far the tokens of each layer are from being one and the same, on the CPU.

    Attributes:
        whole: (layer, sample) residual over all tokens that the mask leaves, special ones too.
        per_modality: (layer, sample, modality) the same over the tokens of one modality, special ones and padding left
            out; NaN where a sample has none of them. None without labels.
    """

    whole: Float[Tensor, "layer sample"]
    per_modality: Float[Tensor, "layer sample modality"] | None = None


def residual(
    tokens: Float[Tensor, "*batch token dim"], mask: Bool[Tensor, "*batch token"] | None = None
) -> Float[Tensor, "*batch token dim"]:
    """res(X) = X - 1 x, with x the mean of the tokens that take part: what makes the tokens different.

    Args:
        tokens: (..., token, dim).
        mask: (..., token), True = takes part; all without it.

    Returns:
        (..., token, dim) in at least float32; zeros for tokens that do not take part, and exactly zero for equal ones.

    Raises:
        ShapeError: no token at all, integers, a mask that does not fit.

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
    # Measured from one of the tokens, so that rounding of the mean leaves nothing where all are equal.
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
    """The relative residual ||res(X)|| / ||X|| of each layer: 0 where all tokens are the same vector.

    ::

        "frobenius"   ||Y|| = sqrt(sum_ij Y_ij^2)                     then it lies in [0, 1]
        "composite"   ||Y|| = sqrt(max_j sum_i |Y_ij|  max_i sum_j |Y_ij|)   the norm of the theorem

    Attention without shortcuts and hidden layers drives it to 0 doubly exponentially. Read it along the layers: a fall
    to nearly 0 says that depth has made the tokens one. It says nothing of rank beyond one, and it is small, too, where
    all tokens carry one large common vector beside different small ones, as language models do.

    Args:
        hidden: (batch, token, dim), or one for each layer; widths may differ between layers.
        mask: (batch, token), True = takes part.
        modality: labels (token,) or (batch, token), -1 = special or padding; asks for each modality alone, too.
        num_modalities: columns of that; by default the highest label + 1.
        norm: "frobenius" or "composite". The mean is taken off in both, though only the first is smallest there.

    Returns:
        RankCollapse. Zeros have residual 0. A sample without any token, and an empty modality, give NaN.

    Raises:
        ConfigError: an unknown norm. ShapeError: hidden states, mask or labels that do not fit.

    Reference: Dong et al., "Attention Is Not All You Need" (ICML 2021); spec 5.6.
    Differs from the paper in: the residual is relative to the layer's own size, and also given for each modality.

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
