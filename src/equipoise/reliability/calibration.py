"""Fits how reliability depends on the evidence: by the likelihood of the targets, or by a conformal quantile."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from .calibration_records import CalibrationRecords
from .marginalization import single_subsets, subset_agreement, subset_log_weights_of_logits

PENALTY = 1e-3
"""Weight of a^2, of the squared slopes and of lambda^2, which keeps all finite where damage is told apart perfectly."""
TEMPERATURE_PENALTY = 0.02
"""Weight of log(T)^2: at T = 0 rho alone would express all uncertainty."""
OWN_WEIGHT = 0.1
"""Weight of the likelihoods of the modalities alone, relative to that of the mixture.

The mixture does not depend on rho_m where another modality determines the prediction.
"""
START = -0.7
"""Initial logarithm of the slopes."""
ITERATIONS = 60


class Calibration(NamedTuple):
    """Fitted constants.

    Attributes:
        intercept: (modality,) a_m.
        log_slope: (modality, evidence) b_mk.
        center: (modality, evidence) median of the evidence on the calibration data.
        log_temperature: logarithm of the temperature; for a regression, of the standard deviation of its errors in
            units of that of the targets.
        log_agreement: logarithm of lambda, the exponent of the agreement of subsets.
    """

    intercept: Tensor
    log_slope: Tensor
    center: Tensor
    log_temperature: Tensor
    log_agreement: Tensor


def reliability_logit(
    evidence: Float[Tensor, "*batch modality evidence"], intercept: Tensor, log_slope: Tensor, center: Tensor
) -> Float[Tensor, "*batch modality"]:
    """Computes the logit of rho, ``a_m - sum_k exp(b_mk) (e_mk - median)``, with ``rho = sigmoid(logit)``.

    Example:
        >>> zero = torch.zeros(1, 1)
        >>> evidence = torch.tensor([[[1.0]], [[torch.inf]]])
        >>> reliability_logit(evidence, torch.zeros(1), zero, zero).sigmoid().flatten()
        tensor([0.2689, 0.0000])
    """
    return intercept - (log_slope.exp() * (evidence - center)).sum(dim=-1)


def own_log_likelihood(
    logit: Float[Tensor, " sample"], logits: Float[Tensor, "sample output"], target: Tensor, task: str,
    log_temperature: Tensor, moments: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, " sample"]:  # fmt: skip
    """Computes ``log(rho p_m(y) + (1 - rho) p_0(y))`` from one modality alone.

    ``p_0`` is uniform over the C classes, and over the 2^C combinations of labels of a multilabel task. For a
    regression, ``p_m`` is a normal distribution around the prediction whose standard deviation is exp(log_temperature)
    times that of the targets, and ``p_0`` the normal distribution with the ``moments`` (mean, standard deviation) of
    the training targets.

    Example:
        >>> known, unknown = torch.tensor([30.0]), torch.tensor([-30.0])
        >>> logits, target, zero = torch.zeros(1, 4), torch.tensor([2]), torch.tensor(0.0)
        >>> own_log_likelihood(unknown, logits, target, "classification", zero).exp()
        tensor([0.2500])
    """
    known, chance = target_log_likelihood(logits, target, task, log_temperature, moments)
    return torch.logaddexp(F.logsigmoid(logit) + known, F.logsigmoid(-logit) + chance)


def target_log_likelihood(
    logits: Float[Tensor, "sample ... output"], target: Tensor, task: str, log_temperature: Tensor,
    moments: tuple[Tensor, Tensor] | None = None,
) -> tuple[Float[Tensor, "sample ..."], Float[Tensor, "sample ..."]]:  # fmt: skip
    """Returns ``log p(y)`` of tempered predictions, and ``log p_0(y)``, see ``own_log_likelihood``."""
    between = [1] * (logits.ndim - 2)
    if task == "classification":
        index = target.long().reshape(-1, *between, 1).expand(*logits.shape[:-1], 1)
        known = (logits / log_temperature.exp()).log_softmax(dim=-1).gather(-1, index)[..., 0]
        return known, torch.full_like(known, -math.log(logits.shape[-1]))
    target = target.to(logits.dtype).reshape(len(logits), *between, logits.shape[-1])
    if task == "multilabel":
        tempered = logits / log_temperature.exp()
        known = -F.binary_cross_entropy_with_logits(tempered, target.expand_as(tempered), reduction="none").sum(dim=-1)
        return known, torch.full_like(known, -logits.shape[-1] * math.log(2))
    assert moments is not None
    mean, std = (part.to(logits) for part in moments)
    known = _normal_log_density((target - logits) / std, log_temperature).sum(dim=-1)
    chance = _normal_log_density((target - mean) / std, torch.zeros_like(log_temperature)).sum(dim=-1)
    return known, chance.expand_as(known)


def fit_calibration(
    records: CalibrationRecords, subsets: Bool[Tensor, "subset modality"], task: str,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Calibration:  # fmt: skip
    """Fits a_m, b_mk, one temperature and lambda with L-BFGS.

    Maximizes the mean log-likelihood of the mixture over subsets, plus ``OWN_WEIGHT`` times that of each modality alone
    (``own_log_likelihood``), minus penalties of the squared constants.

    Args:
        records: calibration data.
        subsets: those of the records.
        task: "classification", "multilabel" or "regression".
        moments: mean and standard deviation of the training targets, for a regression.
    """
    evidence, logits, target, present = records.joined()
    count, kinds = evidence.shape[1:]
    center = torch.stack([evidence[present[:, m], m].median(dim=0).values for m in range(count)])
    evidence = torch.where(present[..., None], evidence, center)
    single = single_subsets(subsets)
    parameters = torch.zeros(count * (1 + kinds) + 2, dtype=torch.float64)
    parameters[:count], parameters[count:-2], parameters[-1] = 2.0, START, -1.0

    def loss(parameters: Tensor) -> Tensor:
        intercept, log_slope, log_temperature, log_agreement = _split(parameters, count, kinds)
        logit = reliability_logit(evidence, intercept, log_slope, center)
        known, chance = target_log_likelihood(logits, target, task, log_temperature, moments)
        own = torch.logaddexp(F.logsigmoid(logit) + known[:, single], F.logsigmoid(-logit) + chance[:, single])
        own = own.masked_fill(~present, 0.0).sum(dim=0) / present.sum(dim=0)
        temperature = 1.0 if task == "regression" else log_temperature.exp()
        agreement = log_agreement.exp() * subset_agreement(logits[:, single], present, subsets, task, temperature)
        fused = (subset_log_weights_of_logits(logit, present, subsets, agreement) + known).logsumexp(dim=1)
        penalty = intercept.square().sum() + log_slope.exp().square().sum() + log_agreement.exp().square()
        total = PENALTY * penalty + TEMPERATURE_PENALTY * log_temperature.square()
        return total - OWN_WEIGHT * own.mean() - fused.mean()

    intercept, log_slope, log_temperature, log_agreement = _split(_minimize(loss, parameters), count, kinds)
    return Calibration(intercept, log_slope, center, log_temperature, log_agreement)


def _split(parameters: Tensor, count: int, kinds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return parameters[:count], parameters[count:-2].view(count, kinds), parameters[-2], parameters[-1]


def conformal_threshold(distances: Float[Tensor, " sample"], alpha: float) -> float:
    """Returns the (1 - alpha) conformal quantile: the ceil((n + 1) (1 - alpha))-th smallest of n distances.

    A new exchangeable sample exceeds it with probability at most alpha. Infinite if n is too small for alpha.

    Example:
        >>> conformal_threshold(torch.arange(99.0), 0.02), conformal_threshold(torch.arange(9.0), 0.02)
        (97.0, inf)
    """
    # Rounding must not move an exact product, such as 100 * 0.98, to the next integer.
    rank = math.ceil((len(distances) + 1) * (1 - alpha) - 1e-9)
    return math.inf if rank > len(distances) else float(distances.sort().values[max(rank, 1) - 1])


def _normal_log_density(error: Tensor, log_std: Tensor) -> Tensor:
    return -0.5 * (error / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)


def _minimize(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return parameters.detach()
