"""Fusions: one family of interchangeable methods, one concept a file."""

from .base import Fusion as Fusion
from .joint import JointAttention as JointAttention
from .static import Concat as Concat
from .static import FiLM as FiLM
from .static import Gated as Gated
from .static import Sum as Sum
from .static import Unimodal as Unimodal
