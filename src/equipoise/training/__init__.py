"""Training: one LightningModule, one run, many runs; resumable at every level."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .comparison import compare as compare
    from .loss_module import BalancedTraining as BalancedTraining
    from .loss_module import SelfContainedTraining as SelfContainedTraining
    from .run import execute_run as execute_run
    from .run_loading import load as load
    from .run_spec import RunSpec as RunSpec

# Lightning is imported only when training starts, so that recipes can be listed and checked quickly.
_LAZY_NAMES = {
    "compare": ".comparison", "BalancedTraining": ".loss_module", "SelfContainedTraining": ".loss_module",
    "execute_run": ".run", "load": ".run_loading", "RunSpec": ".run_spec",
}  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(_LAZY_NAMES[name], __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
