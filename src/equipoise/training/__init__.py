"""Training: LightningModules, single runs and comparisons; all are resumable."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import require_extra

if TYPE_CHECKING:
    from .comparison import compare as compare
    from .loss_module import BalancedTraining as BalancedTraining
    from .loss_module import SelfContainedTraining as SelfContainedTraining
    from .run import execute_run as execute_run
    from .run_cost import RunCost as RunCost
    from .run_cost import predict_cost as predict_cost
    from .run_loading import load as load
    from .run_spec import RunSpec as RunSpec

# Imported at first use, since most of these modules need Lightning: attribute -> module that defines it.
_LAZY_NAMES = {
    "compare": ".comparison", "BalancedTraining": ".loss_module", "SelfContainedTraining": ".loss_module",
    "execute_run": ".run", "load": ".run_loading", "RunSpec": ".run_spec",
    "RunCost": ".run_cost", "predict_cost": ".run_cost",
}  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY_NAMES:
        with require_extra(f"eq.training.{name}"):
            return getattr(importlib.import_module(_LAZY_NAMES[name], __name__), name)
    raise AttributeError(f"module 'equipoise.training' has no attribute '{name}'")
