"""Attention gap: difference between the attention of a modality to itself and to the other modalities."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..geometry import membership
from .model_inputs import Layers, attention_of, key_mask, labels_of

Normalize = Literal["mass", "per_token"]


class GroupShares(NamedTuple):
    """Attention between modalities.

    Attributes:
        share: (layer, sample, head, modality of query, modality of key) mean over the queries; NaN without any.
        rows: (sample, modality of query) number of queries.
    """

    share: Float[Tensor, "layer sample head query key"]
    rows: Float[Tensor, "sample query"]


def attention_gap(
    share: Float[Tensor, "*layer_sample_head query key"],
    *,
    weights: Tensor | None = None,
    normalize: Normalize = "mass",
    counts: Tensor | None = None,
) -> Float[Tensor, " query"]:
    """Computes the imbalance between attention to the own modality and to the others, in percent.

    ::

        gap_m = 100 |S_m - X_m| / (S_m + X_m)     S_m: attention m -> m,  X_m: m -> all other modalities

    S and X are means over heads and samples in each layer; the gap is the mean over layers. 0 means equal attention,
    100 that one of them receives all attention; the share shows which one. Attention to special tokens is excluded.

    Args:
        share: (layer, sample, head, modality of query, modality of key). Leading dimensions may be omitted, starting
            with the layer: (sample, head, query, key), (head, query, key) and (query, key) describe one layer.
        weights: weights of the rows, broadcastable to the shape of ``share`` without its last dimension. The number of
            queries of each row gives a mean over queries; 0 excludes a row. Without weights all rows have the same
            weight, except rows with only NaN.
        normalize: "mass" compares the total attention, which favors modalities with many tokens; "per_token" compares
            the average attention per key.
        counts: number of visible keys, broadcastable to the shape of ``share``. Rows without keys of one of the two
            kinds are excluded. Required for "per_token".

    Returns:
        (modality of query,), in at least float32. NaN for a single modality, and without any valid row.

    Raises:
        ConfigError: an unknown normalization, or "per_token" without counts.
        ShapeError: ``share``, ``weights`` or ``counts`` have another shape.

    A gap may be appropriate if one modality is not informative.

    Reference: MODA (ICML 2025), attention discrepancy of modalities.
    Differs from the paper in: the paper does not specify whether total attention or attention per token is compared;
    both are available.

    Example:
        >>> attention_gap(torch.tensor([[0.75, 0.25], [0.25, 0.25]]))
        tensor([50.,  0.])
    """
    if normalize not in ("mass", "per_token"):
        raise ConfigError("attention_gap", expected="normalize 'mass' or 'per_token'", got=repr(normalize))
    if normalize == "per_token" and counts is None:
        fix = "Give counts, the number of visible keys, or use gap_from_attention, which computes them."
        raise ConfigError("attention_gap", expected="counts for normalize 'per_token'", got="none", fix=fix)
    table = share[(None,) * max(0, 5 - share.ndim)]
    if not share.is_floating_point() or table.ndim != 5 or table.shape[-1] != table.shape[-2] or share.ndim < 2:
        raise ShapeError(
            "attention_gap share",
            expected="a float tensor of shape (layer, sample, head, modality, modality), or without leading dimensions",
            got=f"shape {tuple(share.shape)}, {share.dtype}",
        )
    table = table if table.dtype == torch.float64 else table.float()
    same, cross = _own_and_cross(table)
    if weights is None:
        weights = (~table.isnan().all(dim=-1)).to(same)
    weight = _expanded(weights.to(same), same.shape, "weights") * (table.shape[-1] > 1)
    if counts is not None:
        keys = _own_and_cross(_expanded(counts.to(table), table.shape, "counts"))
        weight = weight * (keys[0] > 0) * (keys[1] > 0)
        if normalize == "per_token":
            same, cross = same / keys[0].clamp(min=1), cross / keys[1].clamp(min=1)
    return _gap(same, cross, weight)


def gap_from_attention(
    attention: Layers,
    modality: Int[Tensor, "... token"],
    num_modalities: int | None = None,
    mask: Bool[Tensor, "batch *query key"] | None = None,
    *,
    normalize: Normalize = "mass",
) -> Float[Tensor, " modality"]:
    """Computes ``attention_gap`` from explicit self-attention, over all queries that see both kinds of keys.

    Args:
        attention: (batch, head, query, key) after softmax, query = key, or one for each layer, such as the
            ``attentions`` of a Hugging Face model.
        modality: labels (token,) or (batch, token), -1 = special or padding, excluded as query and key.
        num_modalities: entries of the result; by default the highest label + 1.
        mask: (batch, key) or (batch, query, key), True = visible. A causal mask must be given: without it the first
            queries are included although they cannot attend to the other modalities.
        normalize: "mass" or "per_token", which divides by the number of visible keys of each query.

    Returns:
        (modality,) in percent, with the same weight for all queries; NaN if no query sees both kinds.

    Raises:
        ConfigError, ShapeError: as in ``attention_gap``; attention that is not square.

    Example:
        >>> attention = torch.tensor([[[[0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.2, 0.3, 0.5]]]])
        >>> gap_from_attention(attention, torch.tensor([0, 0, 1]))
        tensor([60.0000,  0.0000])
        >>> gap_from_attention(attention, torch.tensor([0, 0, 1]), normalize="per_token")
        tensor([33.3333, 33.3333])
    """
    if normalize not in ("mass", "per_token"):
        raise ConfigError("gap_from_attention", expected="normalize 'mass' or 'per_token'", got=repr(normalize))
    layers = attention_of(attention, "gap_from_attention")
    links = _links(layers[0], modality, num_modalities, mask, "gap_from_attention")
    gaps = []
    for layer in layers:
        heads_mean = layer.mean(dim=1).to(links.own.device)
        parts = [torch.where(kind, heads_mean, 0.0).sum(dim=-1) for kind in (links.own, links.cross)]
        if normalize == "per_token":
            counts = [kind.sum(dim=-1).clamp(min=1) for kind in (links.own, links.cross)]
            parts = [part / count for part, count in zip(parts, counts, strict=True)]
        own, cross = (part[None, ..., None].expand(1, *links.rows.shape) for part in parts)
        gaps.append((own, cross))
    own, cross = (torch.cat(parts) for parts in zip(*gaps, strict=True))
    return _gap(own, cross, links.rows.to(own))


def share_table(
    attention: Layers,
    modality: Int[Tensor, "... token"],
    num_modalities: int | None = None,
    mask: Bool[Tensor, "batch *query key"] | None = None,
) -> GroupShares:
    """Computes the attention between modalities from explicit self-attention.

    Only queries that see their own and another modality are included. Arguments and errors as in
    ``gap_from_attention``, whose result is ``attention_gap(table.share, weights=table.rows[:, None])``.

    Example:
        >>> attention = torch.tensor([[[[0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.2, 0.3, 0.5]]]])
        >>> share_table(attention, torch.tensor([0, 0, 1])).share[0, 0, 0]
        tensor([[0.8000, 0.2000],
                [0.5000, 0.5000]])
    """
    layers = attention_of(attention, "share_table")
    links = _links(layers[0], modality, num_modalities, mask, "share_table")
    visible, rows = links.own | links.cross, links.rows
    counts = rows.sum(dim=1)
    tables = []
    for layer in layers:
        masked = torch.where(visible[:, None], layer.to(visible.device), 0.0)
        # (batch, head, query, key) to modalities of keys, then to modalities of queries.
        to_keys = masked @ links.member.mT[:, None].to(masked)
        sums = rows.mT[:, None].to(masked) @ to_keys
        tables.append(sums / counts[:, None, :, None])
    return GroupShares(torch.stack(tables), counts.to(tables[0]))


class _Links(NamedTuple):
    own: Bool[Tensor, "batch query key"]
    cross: Bool[Tensor, "batch query key"]
    rows: Bool[Tensor, "batch query modality"]
    member: Bool[Tensor, "batch modality key"]


def _links(attention: Tensor, modality: Tensor, num_modalities: int | None, mask: Tensor | None, who: str) -> _Links:
    """Masks of the keys of the own and of other modalities, and of the queries that see both, by modality."""
    batch, _, queries, keys = attention.shape
    if queries != keys:
        raise ShapeError(
            f"{who} attention",
            expected="self-attention, query = key",
            got=f"query = {queries}, key = {keys}",
            fix="Run the whole sequence in one forward pass instead of token by token with a cache.",
        )
    labels, count = labels_of(modality, num_modalities, batch, keys, who)
    visible = key_mask(mask, attention, who)
    labels = labels.to(visible.device)
    if mask is not None and mask.ndim == 2:
        labels = labels.masked_fill(~visible[:, 0], -1)
    member = membership(labels, count, batch)
    labeled = member.any(dim=1)
    visible = visible & labeled[:, None, :] & labeled[:, :, None]
    same = labels[:, :, None] == labels[:, None, :]
    own, cross = visible & same, visible & ~same
    both = own.any(dim=-1) & cross.any(dim=-1)
    return _Links(own, cross, member.mT & both[..., None], member)


def _own_and_cross(table: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal, and the sum of the other entries of each row."""
    diagonal = torch.eye(table.shape[-1], dtype=torch.bool, device=table.device)
    return table.diagonal(dim1=-2, dim2=-1), table.masked_fill(diagonal, 0.0).sum(dim=-1)


def _expanded(values: Tensor, shape: torch.Size, what: str) -> Tensor:
    try:
        return values.expand(shape)
    except RuntimeError:
        raise ShapeError(
            f"attention_gap {what}",
            expected=f"a shape that broadcasts to {tuple(shape)}",
            got=f"shape {tuple(values.shape)}",
        ) from None


def _gap(own: Tensor, cross: Tensor, weight: Tensor) -> Tensor:
    """(layer, sample, head, modality) three times -> (modality,); layers without valid rows are excluded."""
    # Sums suffice, since the number of rows cancels.
    own, cross = (torch.where(weight > 0, part * weight, 0.0).sum(dim=(1, 2)) for part in (own, cross))
    gap = 100.0 * (own - cross).abs() / (own + cross)
    counts = own + cross != 0
    return torch.where(counts, gap, 0.0).sum(dim=0) / counts.sum(dim=0)
