"""Fusions: one family of interchangeable methods, one concept a file."""

from .base import Fusion as Fusion
from .contributions import modality_contributions as modality_contributions
from .jmt import JMT as JMT
from .joint import JointAttention as JointAttention
from .mbt import MBT as MBT
from .mid import MidFusion as MidFusion
from .mmml import MMML as MMML
from .moda import MODA as MODA
from .mult import MulT as MulT
from .static import Concat as Concat
from .static import FiLM as FiLM
from .static import Gated as Gated
from .static import Sum as Sum
from .static import Unimodal as Unimodal
