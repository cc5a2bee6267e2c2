"""Pairs samples of two modalities by label, identically on every machine."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import DataError
from .counter_rng import CounterRNG

PAIRING_SEED = 0


def permutation(size: int, salt: str) -> Int[Tensor, " size"]:
    """Returns a permutation of 0 to size - 1 that depends only on the salt.

    Example:
        >>> permutation(7, "images").sort().values
        tensor([0, 1, 2, 3, 4, 5, 6])
    """
    return torch.argsort(CounterRNG(PAIRING_SEED, 0, torch.arange(size), salt).uniform("shuffle", 1)[:, 0], stable=True)


def match_by_label(label: Int[Tensor, " sample"], pool: Int[Tensor, " candidate"], salt: str) -> Int[Tensor, " sample"]:
    """Assigns to every sample a candidate of the same label; candidates are used equally often, up to one.

    Args:
        label: (sample,) labels of the samples.
        pool: (candidate,) labels of the candidates.
        salt: key of the random order of candidates.

    Returns:
        (sample,) positions in ``pool``.

    Raises:
        DataError: no candidate has the label of a sample.

    Example:
        >>> match_by_label(torch.tensor([1, 0, 1]), torch.tensor([0, 1]), "example")
        tensor([1, 0, 1])
    """
    order = permutation(len(pool), salt)
    match = torch.empty_like(label)
    for value in label.unique().tolist():
        candidates = order[pool[order] == value]
        if not len(candidates):
            raise DataError(
                "match_by_label", expected=f"a candidate of label {value}", got=f"labels {pool.unique().tolist()}"
            )
        samples = (label == value).nonzero()[:, 0]
        match[samples] = candidates[torch.arange(len(samples)) % len(candidates)]
    return match
