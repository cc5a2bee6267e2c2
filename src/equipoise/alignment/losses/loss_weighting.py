"""Weighted sums of several losses, with fixed weights or weights learned as uncertainties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import ConfigError, unknown_name
from ...tokens.masks import at_least_float32


class WeightedLoss(NamedTuple):
    """A weighted sum of losses.

    Attributes:
        total: the sum, in float32 or higher precision.
        terms: name -> unweighted loss, detached, for logging.
        weights: name -> weight, detached.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]
    weights: dict[str, Tensor]


def uncertainty_weighted(
    losses: Mapping[str, Tensor], log_variances: Mapping[str, Tensor]
) -> Float[Tensor, ""]:  # fmt: skip
    """Computes ``L = sum_m exp(-s_m) L_m + s_m``, which is minimal at s_m = log L_m.

    Reference: Kendall et al., Multi-Task Learning Using Uncertainty (CVPR 2018), eq. 7.

    Example:
        >>> uncertainty_weighted({"itc": torch.tensor(2.0)}, {"itc": torch.tensor(2.0).log()})
        tensor(1.6931)
    """
    parts = []
    for name, loss in losses.items():
        loss, s = at_least_float32(loss), at_least_float32(log_variances[name])
        parts.append(torch.exp(-s) * loss + s)
    return _added(parts)


class FixedWeights(nn.Module):
    """Weighted sum ``L = sum_m w_m L_m`` of the losses of tasks or modalities; the default weight is 1.

    Args:
        weights: name -> nonnegative weight.

    Raises:
        ConfigError: a negative weight, no losses, or a weight without a loss.

    Example:
        >>> result = FixedWeights({"audio": 2.0})({"audio": torch.tensor(3.0), "image": torch.tensor(1.0)})
        >>> result.total
        tensor(7.)
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        for name, weight in weights.items():
            if not weight >= 0:
                raise ConfigError(f"FixedWeights '{name}'", expected="a weight >= 0", got=f"{weight}")
        self.weights = dict(weights)

    def forward(self, losses: Mapping[str, Tensor]) -> WeightedLoss:
        """name -> loss."""
        _some(losses, "FixedWeights")
        for name in self.weights:
            if name not in losses:
                raise unknown_name("FixedWeights", "loss", name, losses)
        weights = {name: loss.new_tensor(self.weights.get(name, 1.0)) for name, loss in losses.items()}
        total = _added([weights[name] * at_least_float32(loss) for name, loss in losses.items()])
        return WeightedLoss(total, {name: loss.detach() for name, loss in losses.items()}, weights)


class UncertaintyWeights(nn.Module):
    """``uncertainty_weighted`` with learned s_m, initialized to 0; losses missing in a step are skipped.

    Small losses get large weights, which balances tasks of different scales. The weight of a loss that can reach 0
    grows without bound.

    Args:
        names: names of the losses.

    Raises:
        ConfigError: no name, no losses, or an unknown loss.

    Reference: Kendall et al. (CVPR 2018).

    Example:
        >>> UncertaintyWeights(["itc", "itm"])({"itc": torch.tensor(3.0), "itm": torch.tensor(1.0)}).total.item()
        4.0
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})
        _some(self.log_variances, "UncertaintyWeights")

    def forward(self, losses: Mapping[str, Tensor]) -> WeightedLoss:
        """name -> loss."""
        _some(losses, "UncertaintyWeights")
        for name in losses:
            if name not in self.log_variances:
                raise unknown_name("UncertaintyWeights", "loss", name, self.log_variances)
        chosen = {name: self.log_variances[name] for name in losses}
        total = uncertainty_weighted(losses, chosen)
        weights = {name: torch.exp(-s.detach()) for name, s in chosen.items()}
        return WeightedLoss(total, {name: loss.detach() for name, loss in losses.items()}, weights)


def _added(parts: list[Tensor]) -> Tensor:
    """Sum in the widest dtype of the terms."""
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    return torch.stack([part.to(dtype) for part in parts]).sum()


def _some(losses: object, who: str) -> None:
    if not len(losses):  # type: ignore[arg-type]
        raise ConfigError(who, expected="at least one loss", got="none")
