"""Training: one LightningModule, one run, many runs; resumable at every level."""

from .compare import compare as compare
from .experiment import Job as Job
from .experiment import perform as perform
from .load import load as load
from .module import Training as Training
