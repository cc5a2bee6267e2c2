"""Which recording goes with which image: splits and pairs by label, the same on every machine."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import DataError
from .counter_rng import CounterRNG

PAIRING_SEED = 0


def permutation(size: int, salt: str) -> Int[Tensor, " size"]:
    """The numbers 0 to size - 1 in an order that the salt alone decides.

    Example:
        >>> shuffled(7, "images").sort().values
        tensor([0, 1, 2, 3, 4, 5, 6])
    """
    return torch.argsort(CounterRNG(PAIRING_SEED, 0, torch.arange(size), salt).uniform("shuffle", 1)[:, 0], stable=True)


def match_by_label(label: Int[Tensor, " sample"], pool: Int[Tensor, " candidate"], salt: str) -> Int[Tensor, " sample"]:
    """For every sample a candidate of its label; each is used equally often, give or take one.

    Args:
        label: (sample,) of the samples that look for a partner.
        pool: (candidate,) labels of the candidates.
        salt: changes the pairs.

    Returns:
        (sample,) positions in ``pool``.

    Raises:
        DataError: a label that no candidate has.

    Example:
        >>> paired(torch.tensor([1, 0, 1]), torch.tensor([0, 1]), "example")
        tensor([1, 0, 1])
    """
    order = permutation(len(pool), salt)
    partner = torch.empty_like(label)
    for value in label.unique().tolist():
        candidates = order[pool[order] == value]
        if not len(candidates):
            raise DataError("paired", expected=f"a partner of label {value}", got=f"labels {pool.unique().tolist()}")
        seekers = (label == value).nonzero()[:, 0]
        partner[seekers] = candidates[torch.arange(len(seekers)) % len(candidates)]
    return partner
