"""Which options of RollingQ make sense."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from ...errors import ConfigError
from .share_weights import check_target


def check_options(balancer: Any, tail: int | None) -> None:
    """Raises ConfigError for the first option of a RollingQ that is out of range."""
    budget = balancer.max_rotations
    limits = {
        "rho >= 0 and finite": _reaches(balancer.rho, 0) and balancer.rho < math.inf,
        "beta >= 0": _reaches(balancer.beta, 0),
        "max_rotations >= 0 or None": budget is None or _reaches(budget, 0, Integral),
        "tail >= 1 or None": tail is None or _reaches(tail, 1, Integral),
        "warmup_epochs >= 0": _reaches(balancer.warmup_epochs, 0, Integral),
        "min_epochs_between >= 1": _reaches(balancer.min_epochs_between, 1, Integral),
        "statistics 'tail' or 'full_pass'": balancer.statistics in ("tail", "full_pass"),
        "indicator 'cosine', 'logit', 'mass' or 'mass_per_token'": balancer.indicator
        in ("cosine", "logit", "mass", "mass_per_token"),
        "query_rows 'first' or 'all'": balancer.query_rows in ("first", "all"),
        "heads 'per_head' or 'joint'": balancer.heads in ("per_head", "joint"),
        "rotation 'minimal' or 'svd'": balancer.method in ("minimal", "svd"),
    }
    if balancer.target_share is not None:
        check_target(balancer.names, balancer.target_share)
    for expected, holds in limits.items():
        if not holds:
            name = expected.split()[0]
            got = {"rotation": balancer.method, "tail": tail}.get(name, getattr(balancer, name, None))
            fix = "Give a number, not a text." if isinstance(got, str) and ">=" in expected else ""
            raise ConfigError("RollingQ", expected=expected, got=f"{name} = {got!r}", fix=fix)


def _reaches(value: Any, least: int, kind: type = Real) -> bool:
    """Whether it is a number of that kind, and at least so large."""
    return isinstance(value, kind) and value >= least
