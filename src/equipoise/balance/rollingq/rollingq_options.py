"""Checks of the options of RollingQ."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from ...errors import ConfigError
from .rolling_step import ROTATIONS
from .share_weights import check_target


def check_options(balancer: Any, tail: int | None) -> None:
    """Raises ConfigError for the first option of a RollingQ that is out of range."""
    budget = balancer.max_rotations
    limits = {
        "rho >= 0 and finite": _at_least(balancer.rho, 0) and balancer.rho < math.inf,
        "beta >= 0": _at_least(balancer.beta, 0),
        "max_rotations >= 0 or None": budget is None or _at_least(budget, 0, Integral),
        "tail >= 1 or None": tail is None or _at_least(tail, 1, Integral),
        "warmup_epochs >= 0": _at_least(balancer.warmup_epochs, 0, Integral),
        "min_epochs_between >= 1": _at_least(balancer.min_epochs_between, 1, Integral),
        "statistics 'tail' or 'full_pass'": balancer.statistics in ("tail", "full_pass"),
        "indicator 'cosine', 'logit', 'mass' or 'mass_per_token'": balancer.indicator
        in ("cosine", "logit", "mass", "mass_per_token"),
        "query_rows 'first' or 'all'": balancer.query_rows in ("first", "all"),
        "heads 'per_head' or 'joint'": balancer.heads in ("per_head", "joint"),
        f"rotation {', '.join(map(repr, ROTATIONS))}": balancer.method in ROTATIONS,
        "seed >= 0": _at_least(balancer.seed, 0, Integral),
    }
    if balancer.target_share is not None:
        check_target(balancer.names, balancer.target_share)
    for expected, holds in limits.items():
        if not holds:
            name = expected.split()[0]
            got = {"rotation": balancer.method, "tail": tail}.get(name, getattr(balancer, name, None))
            fix = "Use a number, not a string." if isinstance(got, str) and ">=" in expected else ""
            raise ConfigError("RollingQ", expected=expected, got=f"{name} = {got!r}", fix=fix)


def _at_least(value: Any, minimum: int, kind: type = Real) -> bool:
    """Returns whether value is a number of this type and not below the minimum."""
    return isinstance(value, kind) and value >= minimum
