"""Anchor weights for a target share of attention between two modalities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError
from ...geometry import VANISHING


def weights_for_share(
    query: Float[Tensor, " d"],
    keys: Mapping[str, Float[Tensor, " d"]],
    tokens: Mapping[str, float],
    target: Mapping[str, float],
) -> dict[str, float]:
    """Returns the alpha whose anchor gives two mean keys the target shares, or the nearest end of [0, 1].

    With q(alpha) the anchor, the share of m is proportional to L_m exp(q(alpha) . E[K_m] / sqrt(d)); the first
    modality's grows with alpha, so bisection finds it.

    Args:
        query: (d,) mean query.
        keys: name -> (d,) mean key, of exactly two modalities.
        tokens: name -> mean number of tokens L_m.
        target: name -> target share; the two sum to 1.

    Raises:
        ConfigError: another number of modalities, or invalid shares.
    """
    names = tuple(keys)
    check_target(names, target)
    first, second = names
    interior = min(target.values()) > 0
    target_odds = math.log(target[first] / target[second]) if interior else math.copysign(math.inf, target[first] - 0.5)
    units = {name: key / key.norm().clamp(min=VANISHING) for name, key in keys.items()}
    length = query.norm()

    def log_odds(alpha: float) -> float:
        mixed = alpha * units[first] + (1 - alpha) * units[second]
        anchor = mixed / mixed.norm().clamp(min=VANISHING) * length
        gap = anchor @ (keys[first] - keys[second]) / math.sqrt(len(query))
        return float(gap) + math.log(tokens[first] / tokens[second])

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if log_odds(middle) < target_odds else (low, middle)
    alpha = (low + high) / 2
    return {first: alpha, second: 1.0 - alpha}


def check_target(names: Sequence[str], target: Mapping[str, float]) -> None:
    """Raises ConfigError unless the target has one valid share for each of two modalities."""
    sums_to_1 = math.isclose(sum(target.values()), 1.0, abs_tol=1e-6) and min(target.values()) >= 0
    if len(names) != 2 or set(target) != set(names) or not sums_to_1:
        raise ConfigError(
            "RollingQ target_share",
            expected="shares of exactly two modalities that sum to 1",
            got=f"{dict(target)} for {', '.join(names)}",
            fix="Do not use target_share with more modalities.",
        )
