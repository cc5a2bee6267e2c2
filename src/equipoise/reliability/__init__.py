"""Reliability of modalities for each sample, and predictions that are marginalized over which of them are usable."""

from .calibration import conformal_threshold as conformal_threshold
from .calibration import own_log_likelihood as own_log_likelihood
from .marginalization import mix_predictions as mix_predictions
from .marginalization import subset_log_weights as subset_log_weights
from .marginalization import usable_subsets as usable_subsets
from .reliable_model import Reliability as Reliability
