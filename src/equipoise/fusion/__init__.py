"""Fusion methods: interchangeable modules from `{name: Tokens}` to `Output`."""

from .fusion_base import Fusion as Fusion
from .jmt import JMT as JMT
from .joint_attention import JointAttention as JointAttention
from .logit_contributions import modality_contributions as modality_contributions
from .mbt import MBT as MBT
from .mid_fusion import MidFusion as MidFusion
from .mmml import MMML as MMML
from .moda import MODA as MODA
from .mult import MulT as MulT
from .static_fusion import Concat as Concat
from .static_fusion import FiLM as FiLM
from .static_fusion import Gated as Gated
from .static_fusion import Sum as Sum
from .static_fusion import Unimodal as Unimodal
