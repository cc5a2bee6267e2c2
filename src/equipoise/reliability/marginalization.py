"""Predictions marginalized over which modalities are usable: subsets, their weights, and the mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..tokens.masks import at_least_float32

MOST_FOR_ALL = 4
"""Largest number of modalities for which all subsets are used."""
LEAST = 1e-6
"""Lower limit of rho and of 1 - rho for samples for which no listed subset has a positive weight."""


def usable_subsets(count: int) -> Bool[Tensor, "subset modality"]:
    """Lists the subsets of modalities that are marginalized over; the first one is the full set.

    All non-empty subsets for up to four modalities; for more the full set, those without one modality, and the single
    ones.

    Example:
        >>> usable_subsets(2).tolist()
        [[True, True], [True, False], [False, True]]
    """
    if count <= MOST_FOR_ALL:
        numbers = torch.arange(2**count - 1, 0, -1)[:, None]
        return numbers >> torch.arange(count - 1, -1, -1) & 1 == 1
    single = torch.eye(count, dtype=torch.bool)
    return torch.cat([torch.ones(1, count, dtype=torch.bool), ~single, single])


def subset_log_weights(
    rho: Float[Tensor, "batch modality"], present: Bool[Tensor, "batch modality"], subsets: Bool[Tensor, "subset modality"]
) -> Float[Tensor, "batch subset"]:  # fmt: skip
    """Computes the logarithm of the weights of the subsets, which sum to 1 for each sample::

        w_S ∝ prod_{m in S} rho_m  prod_{m not in S} (1 - rho_m)

    Modalities that a sample lacks are masked in every subset, so that they have no factor; subsets that are equal
    without them count once. A sample without any modality has the full set.

    Args:
        rho: probability that a modality is usable.
        present: which modalities each sample has.
        subsets: as ``usable_subsets`` returns them.

    Example:
        >>> rho, present = torch.tensor([[0.5, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> subset_log_weights(rho, present, usable_subsets(2)).exp()
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    rho = at_least_float32(rho)
    subsets = subsets.to(rho.device)
    left = subsets[None] & present[:, None]
    # Two subsets of a sample are equal if they differ in absent modalities alone: the earlier one counts.
    same = (left[:, :, None] == left[:, None]).all(dim=-1)
    repeated = same.tril(diagonal=-1).any(dim=-1)
    excluded = repeated | ~left.any(dim=-1)
    # A sample without any modality has equal, empty subsets: the first one, the full set, is kept.
    excluded[:, 0] &= present.any(dim=1)

    def logarithm(rho: Tensor) -> Tensor:
        factors = torch.where(subsets[None], rho.log()[:, None], torch.log1p(-rho)[:, None])
        total = factors.masked_fill(~present[:, None], 0.0).sum(dim=-1)
        return total.masked_fill(excluded, -torch.inf)

    exact = logarithm(rho)
    impossible = exact.isneginf().all(dim=1, keepdim=True)
    total = torch.where(impossible, logarithm(rho.clamp(LEAST, 1 - LEAST)), exact)
    return total.log_softmax(dim=1)


def mix_predictions(
    logits: Float[Tensor, "batch subset output"], log_weights: Float[Tensor, "batch subset"], task: str,
    temperature: Float[Tensor, ""] | float = 1.0,
) -> Float[Tensor, "batch output"]:  # fmt: skip
    """Mixes the predictions of the subsets, ``p(y | x) = sum_S w_S p_S(y | x)``, in float32 or higher precision.

    Classification: log-probabilities ``log sum_S w_S softmax(logits_S / T)``. Multilabel: the logit of the mixture of
    the probabilities of each label. Regression: the weighted mean of the predictions; it has no temperature.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [9.0, -9.0]]])
        >>> mix_predictions(logits, torch.tensor([[0.5, 0.5]]).log(), "classification").exp()
        tensor([[0.7500, 0.2500]])
    """
    logits, log_weights = at_least_float32(logits), at_least_float32(log_weights)[..., None]
    if task == "regression":
        return (log_weights.exp() * logits).sum(dim=1)
    logits = logits / temperature
    if task == "classification":
        return (log_weights + logits.log_softmax(dim=-1)).logsumexp(dim=1)
    yes, no = ((log_weights + F.logsigmoid(part)).logsumexp(dim=1) for part in (logits, -logits))
    return yes - no


def subset_names(subsets: Bool[Tensor, "subset modality"], names: Sequence[str]) -> list[list[str]]:
    """Returns the names of the modalities of each subset."""
    return [[name for name, present in zip(names, row, strict=True) if present] for row in subsets.tolist()]
