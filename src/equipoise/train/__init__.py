"""Training: one LightningModule, one run, many runs; resumable at every level."""

from .compare import compare as compare
from .experiment import perform as perform
from .job import Job as Job
from .load import load as load
from .module import ObjectiveTraining as ObjectiveTraining
from .module import Training as Training
