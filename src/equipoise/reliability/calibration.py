"""Fits how reliability depends on the distance: by the likelihood of each modality alone, or by a conformal
quantile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

PENALTY = 1e-4
"""Weight of a^2 + b^2, which keeps both finite if damaged and clean samples are perfectly separable."""
TEMPERATURE_PENALTY = 0.02
"""Weight of log(T)^2: at T = 0 rho alone would express all uncertainty."""
STARTS = (0.0, 1.5)
"""Initial values of b; the better result is used."""


class Calibration(NamedTuple):
    """Fitted constants.

    Attributes:
        intercept: (modality,) a_m.
        log_slope: (modality,) b_m.
        center: (modality,) median of log d_m on the calibration data.
        log_temperature: logarithm of the temperature; for a regression, of the standard deviation of its errors in
            units of that of the targets.
    """

    intercept: Tensor
    log_slope: Tensor
    center: Tensor
    log_temperature: Tensor


@dataclass(eq=False)
class ModalityRecords:
    """Calibration data of one modality: log distances, predictions from it alone, and targets."""

    distances: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def add(self, distance: Tensor, logits: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds the samples that have the modality and a finite distance and prediction."""
        valid = valid & distance.isfinite() & logits.flatten(1).isfinite().all(dim=1)
        for store, values in ((self.distances, distance), (self.logits, logits), (self.targets, target)):
            store.append(values[valid.to(values.device)].detach().cpu())

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns distances and logits in float64, and targets."""
        return torch.cat(self.distances).double(), torch.cat(self.logits).double(), torch.cat(self.targets)


def reliability_logit(
    distance: Float[Tensor, "*batch modality"], intercept: Tensor, log_slope: Tensor, center: Tensor
) -> Float[Tensor, "*batch modality"]:
    """Computes the logit of rho, ``a_m - exp(b_m) (log d_m - median)``, with ``rho = sigmoid(logit)``.

    Example:
        >>> zero = torch.zeros(1)
        >>> reliability_logit(torch.tensor([[1.0], [torch.inf]]), zero, zero, zero).sigmoid().flatten()
        tensor([0.2689, 0.0000])
    """
    return intercept - log_slope.exp() * (distance - center)


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
    if task == "classification":
        log_likelihood = (logits / log_temperature.exp()).log_softmax(dim=1).gather(1, target.long()[:, None])[:, 0]
        chance = torch.full_like(log_likelihood, -math.log(logits.shape[1]))
    elif task == "multilabel":
        tempered = logits / log_temperature.exp()
        log_likelihood = -F.binary_cross_entropy_with_logits(
            tempered, target.to(logits.dtype).reshape(logits.shape), reduction="none"
        ).sum(dim=1)
        chance = torch.full_like(log_likelihood, -logits.shape[1] * math.log(2))
    else:
        assert moments is not None
        mean, std = (part.to(logits) for part in moments)
        target = target.to(logits.dtype).reshape(logits.shape)
        log_likelihood = _normal_log_density((target - logits) / std, log_temperature).sum(dim=1)
        chance = _normal_log_density((target - mean) / std, torch.zeros_like(log_temperature)).sum(dim=1)
    return torch.logaddexp(F.logsigmoid(logit) + log_likelihood, F.logsigmoid(-logit) + chance)


def fit_calibration(
    records: Mapping[str, ModalityRecords], task: str, moments: tuple[Tensor, Tensor] | None = None
) -> Calibration:
    """Fits a_m, b_m and one temperature by the sum over modalities of the mean own log-likelihood, with L-BFGS.

    Args:
        records: modality -> calibration data.
        task: "classification", "multilabel" or "regression".
        moments: mean and standard deviation of the training targets, for a regression.
    """
    data = [part.joined() for part in records.values()]
    center = torch.stack([distance.median() for distance, _, _ in data])
    best: tuple[float, Tensor] | None = None
    for start in STARTS:
        parameters = torch.zeros(2 * len(data) + 1, dtype=torch.float64)
        parameters[: len(data)], parameters[len(data) : -1] = 2.0, start
        parameters.requires_grad_()

        def loss(parameters: Tensor = parameters) -> Tensor:
            intercept, log_slope = parameters[:-1].view(2, -1)
            total = PENALTY * parameters[:-1].square().sum() + TEMPERATURE_PENALTY * parameters[-1].square()
            for index, (distance, logits, target) in enumerate(data):
                logit = reliability_logit(distance, intercept[index], log_slope[index], center[index])
                total = total - own_log_likelihood(logit, logits, target, task, parameters[-1], moments).mean()
            return total

        value = _minimize(loss, parameters)
        if best is None or value < best[0]:
            best = value, parameters.detach()
    assert best is not None
    intercept, log_slope = best[1][:-1].view(2, -1)
    return Calibration(intercept, log_slope, center, best[1][-1])


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


def _minimize(loss, parameters: Tensor) -> float:
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
        return float(loss().detach())
