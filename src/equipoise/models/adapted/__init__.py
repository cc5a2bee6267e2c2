"""Adapts any module to balancers and diagnostics."""

from .adapted_model import AdaptedModel as AdaptedModel
from .model_adaptation import adapt as adapt
