"""Predictions marginalized over which modalities are usable: subsets, their weights, and the mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..tokens.masks import at_least_float32

UNIFORM = 0.05
"""Part of the uniform distribution in predictions whose agreement is measured: none is certain."""
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
    rho: Float[Tensor, "batch modality"],
    present: Bool[Tensor, "batch modality"],
    subsets: Bool[Tensor, "subset modality"],
    agreement: Float[Tensor, "batch subset"] | None = None,
) -> Float[Tensor, "batch subset"]:
    """Computes the logarithm of the weights of the subsets, which sum to 1 for each sample::

        w_S ∝ A_S prod_{m in S} rho_m  prod_{m not in S} (1 - rho_m)

    Modalities that a sample lacks are masked in every subset, so that they have no factor; subsets that are equal
    without them count once. A sample without any modality has the full set.

    Args:
        rho: probability that a modality is usable.
        present: which modalities each sample has.
        subsets: as ``usable_subsets`` returns them.
        agreement: log A_S, as ``subset_agreement`` returns it; 0 by default.

    Example:
        >>> rho, present = torch.tensor([[0.5, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> subset_log_weights(rho, present, usable_subsets(2)).exp()
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    rho = at_least_float32(rho)
    excluded = _excluded(present, subsets.to(rho.device))
    exact = _log_products(rho.log(), torch.log1p(-rho), present, subsets, excluded)
    impossible = exact.isneginf().all(dim=1, keepdim=True)
    near = rho.clamp(LEAST, 1 - LEAST)
    total = torch.where(
        impossible, _log_products(near.log(), torch.log1p(-near), present, subsets, excluded), exact
    )  # fmt: skip
    return (total if agreement is None else total + agreement).log_softmax(dim=1)


def subset_log_weights_of_logits(
    logits: Float[Tensor, "batch modality"],
    present: Bool[Tensor, "batch modality"],
    subsets: Bool[Tensor, "subset modality"],
    agreement: Float[Tensor, "batch subset"] | None = None,
) -> Float[Tensor, "batch subset"]:
    """Computes the same as ``subset_log_weights`` from the logits of rho, which must be finite."""
    excluded = _excluded(present, subsets)
    total = _log_products(F.logsigmoid(logits), F.logsigmoid(-logits), present, subsets, excluded)
    return (total if agreement is None else total + agreement).log_softmax(dim=1)


def subset_agreement(
    logits: Float[Tensor, "batch modality output"], present: Bool[Tensor, "batch modality"],
    subsets: Bool[Tensor, "subset modality"], task: str, temperature: Float[Tensor, ""] | float = 1.0,
) -> Float[Tensor, "batch subset"]:  # fmt: skip
    """Computes log A_S, how much the predictions from the modalities of a subset alone agree::

        A_S = sum_y 1 / C prod_{m in S} C q_m(y),    q_m = (1 - e) p_m + e / C,   e = 0.05

    This is the probability of the predictions if all modalities of S predict the same target, relative to that if each
    predicts another one. It is 1 for a single modality and for uniform predictions, up to C^(|S| - 1) for certain
    predictions of the same class, and small for contradictions. For several labels it is the product over labels, with
    C = 2.

    Args:
        logits: of the model with each modality alone.
        present: which modalities each sample has; absent ones have no factor.
        subsets: as ``usable_subsets`` returns them.
        task: "classification" or "multilabel"; a regression has A_S = 1.
        temperature: divides the logits.

    Example:
        >>> logits, present = torch.tensor([[[0.0, 0.0], [50.0, 0.0]]]), torch.ones(1, 2, dtype=torch.bool)
        >>> subset_agreement(logits, present, usable_subsets(2), "classification").abs().round(decimals=4)
        tensor([[0., 0., 0.]])
    """
    subsets = subsets.to(logits.device)
    if task == "regression":
        return at_least_float32(logits).new_zeros(len(logits), len(subsets))
    logits = at_least_float32(logits) / temperature
    if task == "classification":
        log_p, classes = logits.log_softmax(dim=-1), logits.shape[-1]
    else:
        log_p, classes = torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1), 2
    # Evidence of each class relative to a uniform prediction; 0 for absent modalities.
    relative = ((1 - UNIFORM) * classes * log_p.exp() + UNIFORM).log()
    relative = relative.masked_fill(~present.reshape(*present.shape, *[1] * (log_p.ndim - 2)), 0.0)
    sums = torch.einsum("sm,bm...->bs...", subsets.to(relative.dtype), relative)
    agreement = sums.logsumexp(dim=-1) - math.log(classes)
    return agreement if task == "classification" else agreement.sum(dim=-1)


def _excluded(present: Tensor, subsets: Tensor) -> Bool[Tensor, "batch subset"]:
    """Subsets that contain no modality of a sample, or the same ones as an earlier subset."""
    left = subsets[None] & present[:, None]
    # Two subsets of a sample are equal if they differ in absent modalities alone: the earlier one counts.
    same = (left[:, :, None] == left[:, None]).all(dim=-1)
    repeated = same.tril(diagonal=-1).any(dim=-1)
    excluded = repeated | ~left.any(dim=-1)
    # A sample without any modality has equal, empty subsets: the first one, the full set, is kept.
    excluded[:, 0] &= present.any(dim=1)
    return excluded


def _log_products(log_usable: Tensor, log_not: Tensor, present: Tensor, subsets: Tensor, excluded: Tensor) -> Tensor:
    factors = torch.where(subsets.to(present.device)[None], log_usable[:, None], log_not[:, None])
    total = factors.masked_fill(~present[:, None], 0.0).sum(dim=-1)
    return total.masked_fill(excluded, -torch.inf)


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


def single_subsets(subsets: Bool[Tensor, "subset modality"]) -> Int[Tensor, " modality"]:
    """Returns the index of the subset that contains each modality alone.

    Example:
        >>> single_subsets(usable_subsets(2))
        tensor([1, 2])
    """
    alone = torch.eye(subsets.shape[1], dtype=torch.bool, device=subsets.device)
    return (subsets[:, None] == alone).all(dim=-1).long().argmax(dim=0)


def subset_names(subsets: Bool[Tensor, "subset modality"], names: Sequence[str]) -> list[list[str]]:
    """Returns the names of the modalities of each subset."""
    return [[name for name, present in zip(names, row, strict=True) if present] for row in subsets.tolist()]
