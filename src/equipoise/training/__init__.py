"""Training: one LightningModule, one run, many runs; resumable at every level."""

from .comparison import compare as compare
from .loss_module import BalancedTraining as BalancedTraining
from .loss_module import SelfContainedTraining as SelfContainedTraining
from .run import execute_run as execute_run
from .run_loading import load as load
from .run_spec import RunSpec as RunSpec
