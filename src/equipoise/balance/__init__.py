"""Balancing methods: one method, one file."""

from .balancing import Balancing as Balancing
from .base import Balancer as Balancer
from .blending import GradientBlending as GradientBlending
from .cml import CML as CML
from .folding import fold as fold
from .greedy import Greedy as Greedy
from .lfm import LFM as LFM
from .mla import MLA as MLA
from .mmpareto import MMPareto as MMPareto
from .pmr import PMR as PMR
from .progressive import ProgressiveRollingQ as ProgressiveRollingQ
from .reconboost import ReconBoost as ReconBoost
from .rolling_query import RollingStep as RollingStep
from .rolling_query import rolling_query as rolling_query
from .rollingq import RollingQ as RollingQ
from .umt import UMT as UMT
