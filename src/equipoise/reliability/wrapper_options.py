"""Options of ``Reliability``: the distance, the form of masking, and the level of the conformal form."""

from __future__ import annotations

from typing import Any, Literal

from ..errors import ConfigError, unknown_name
from .training_distance import NEIGHBORS

DistanceName = Literal["knn", "mahalanobis", "energy", "input"]
Form = Literal["marginal", "conformal"]
DISTANCES = ("knn", "mahalanobis", "energy", "input")
FORMS = ("marginal", "conformal")


def check_options(distance: Any, form: Any, alpha: Any, task: str, who: str) -> None:
    """Checks the options of the wrapper of a model for a task.

    Raises:
        ConfigError: an unknown distance or form, alpha outside (0, 1), or the energy of a regression.
    """
    for kind, value, known in (("distance", distance, DISTANCES), ("form", form, FORMS)):
        if value not in known:
            raise unknown_name(who, kind, str(value), known)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise ConfigError(who, expected="0 < alpha < 1", got=f"alpha = {alpha!r}")
    if distance == "energy" and task == "regression":
        raise ConfigError(
            who, expected="another distance for a regression, which has no energy", got="distance='energy'",
            fix="Choose 'knn', 'mahalanobis' or 'input'.",
        )  # fmt: skip


def check_prototypes(prototypes: Any, who: str) -> None:
    """Raises ConfigError unless the number of prototypes is a whole number of at least ``NEIGHBORS``."""
    if isinstance(prototypes, bool) or not isinstance(prototypes, int) or prototypes < NEIGHBORS:
        raise ConfigError(who, expected=f"prototypes >= {NEIGHBORS}", got=f"prototypes = {prototypes!r}")
