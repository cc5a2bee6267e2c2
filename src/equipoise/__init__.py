"""equipoise: measure how a multimodal transformer uses its modalities, and train it to use all of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if not TYPE_CHECKING:
    # Must be imported first: it handles Ctrl-C during the remaining imports.
    from .io import interrupt_handling as interrupt_handling

from . import alignment as alignment
from . import balance as balance
from . import consistency as consistency
from . import data as data
from . import diagnostics as diagnostics
from . import encoders as encoders
from . import errors as errors
from . import fusion as fusion
from . import geometry as geometry
from . import models as models
from . import nn as nn
from . import results as results
from .balance import BalancerList as BalancerList
from .balance import merge_rotations as merge_rotations
from .diagnostics.steering import steer as steer
from .diagnostics.suite import Diagnosis as Diagnosis
from .diagnostics.suite import diagnose as diagnose
from .errors import EquipoiseError as EquipoiseError
from .errors import require_extra as _require_extra
from .models import FusionModel as FusionModel
from .models import adapt as adapt
from .nn import Attended as Attended
from .nn import attend as attend
from .recording import AttentionRecord as AttentionRecord
from .recording import watch as watch
from .tokens import Output as Output
from .tokens import Tokens as Tokens
from .tokens import pack as pack
from .tokens import unpack as unpack

if TYPE_CHECKING:
    from .evaluation import evaluate as evaluate
    from .evaluation.questions import blind as blind
    from .inspection import Inspection as Inspection
    from .inspection import look as look
    from .integrations import huggingface as hf  # noqa: F401
    from .integrations import lightning_callbacks as lightning  # noqa: F401
    from .reliability import Reliability as Reliability
    from .training import load as load

__version__ = "0.1.0"

# Submodules that need optional packages are imported at first use: attribute -> module.
_LAZY_MODULES = {
    "report": ".report", "training": ".training", "evaluation": ".evaluation",
    "hf": ".integrations.huggingface", "lightning": ".integrations.lightning_callbacks",
}  # fmt: skip
# Names from such modules: attribute -> module that defines it.
_LAZY_NAMES = {
    "load": ".training.run_loading", "evaluate": ".evaluation", "look": ".inspection", "Inspection": ".inspection",
    "Reliability": ".reliability", "blind": ".evaluation.questions",
}  # fmt: skip


def __getattr__(name: str):
    with _require_extra(f"eq.{name}"):
        if name in _LAZY_MODULES:
            return importlib.import_module(_LAZY_MODULES[name], __name__)
        if name in _LAZY_NAMES:
            return getattr(importlib.import_module(_LAZY_NAMES[name], __name__), name)
    raise AttributeError(f"module 'equipoise' has no attribute '{name}'")
