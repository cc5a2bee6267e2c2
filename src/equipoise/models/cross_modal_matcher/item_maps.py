"""Matching maps between the items of two modalities, from projections per pair or shared by all pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...consistency.matching_matrix import soft_matching
from ...nn.transformer import initialize_weights
from .modality_pairs import Pair


class PairScores(nn.Module):
    """Attention scores between the items of each ordered pair of modalities::

        s_ij = (x_i Q_ij) (x_j K_ij)^T / sqrt(width)         Q and K of the ordered pair (i, j) only
        s_ij = (x_i W_i) (x_j W_j)^T / sqrt(width)           with ``shared``: one space for all

    With separate projections, training one pair does not change the scores of another.

    Args:
        names: modality names.
        dim: width of the items.
        width: width of the projections.
        shared: one projection per modality instead of two per pair.

    Example:
        >>> scores = PairScores(("audio", "image"), 8, width=8)
        >>> output = scores({"audio": torch.ones(2, 3, 8), "image": torch.ones(2, 5, 8)})
        >>> output["audio", "image"].shape, output["image", "audio"].shape
        (torch.Size([2, 3, 5]), torch.Size([2, 5, 3]))
    """

    def __init__(self, names: Sequence[str], dim: int, *, width: int, shared: bool = False) -> None:
        super().__init__()
        self.names, self.width, self.shared = tuple(names), width, shared
        keys = self.names if shared else [_key(pair) for pair in permutations(self.names, 2)]
        self.query = nn.ModuleDict({key: nn.Linear(dim, width, bias=not shared) for key in keys})
        self.key = None if shared else nn.ModuleDict({key: nn.Linear(dim, width) for key in keys})
        initialize_weights(self)

    def freeze(self, pair: Pair) -> None:
        """Freezes the projections of a pair in both directions; no effect with shared projections."""
        if self.key is not None:
            for key in (_key(pair), _key(pair[::-1])):
                self.query[key].requires_grad_(False)
                self.key[key].requires_grad_(False)

    def forward(self, items: Mapping[str, Float[Tensor, "batch _ dim"]]) -> dict[Pair, Tensor]:
        """Computes ordered pair -> (batch, item of the first, item of the second) for all modalities in ``items``."""
        scores = {}
        for one, other in permutations([name for name in self.names if name in items], 2):
            if self.key is None:
                query, key = self.query[one](items[one]), self.query[other](items[other])
            else:
                pair = _key((one, other))
                query, key = self.query[pair](items[one]), self.key[pair](items[other])
            scores[one, other] = query @ key.transpose(-1, -2) / math.sqrt(self.width)
        return scores


def matching_maps(
    scores: Mapping[Pair, Tensor], present: Mapping[str, Bool[Tensor, "batch _"]], *, sinkhorn: int = 0,
    temperature: float = 1.0,
) -> dict[Pair, Tensor]:  # fmt: skip
    """Converts scores to maps: rows of present items sum to 1; rows and columns of missing items are 0."""
    return {
        (one, other): soft_matching(values / temperature, rows=present[one], columns=present[other], sinkhorn=sinkhorn)
        for (one, other), values in scores.items()
    }


def matched_items(
    target: Int[Tensor, "batch modality item"], one: int, other: int
) -> tuple[Int[Tensor, "batch item"], Bool[Tensor, "batch item"]]:
    """Returns, for every item of modality ``one``, the index of its match in ``other`` and whether it has one.

    Example:
        >>> matched_items(torch.tensor([[[7, 3, 1], [3, 7, 2]]]), 0, 1)
        (tensor([[1, 0, 0]]), tensor([[ True,  True, False]]))
    """
    same = target[:, one, :, None] == target[:, other, None, :]
    return same.long().argmax(dim=-1), same.any(dim=-1)


def composed_maps(maps: Mapping[Pair, Tensor], one: str, other: str) -> Float[Tensor, "batch row column"]:
    """Mean over third modalities k of P_ik P_kj, which equals P_ij if the maps are consistent."""
    compositions = [
        maps[one, name] @ maps[name, other]
        for name in dict.fromkeys(part for pair in maps for part in pair)
        if name not in (one, other)
    ]
    return torch.stack(compositions).mean(dim=0)


def _key(pair: Sequence[str]) -> str:
    return "->".join(pair)
