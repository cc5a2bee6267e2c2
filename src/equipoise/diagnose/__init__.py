"""Diagnostics: what a model does with its modalities, and what it costs."""

from .confidence import energy as energy
from .confidence import gen_score as gen_score
from .confidence import max_logit as max_logit
from .confidence import msp as msp
from .corruption import CorruptionCurve as CorruptionCurve
from .corruption import corruption_curve as corruption_curve
from .cost import Cost as Cost
from .cost import cost as cost
from .damage import corrupt as corrupt
from .gradients import GradientNorms as GradientNorms
from .gradients import gradient_norms as gradient_norms
from .masking import Masking as Masking
from .masking import mask_modality as mask_modality
from .noise import NoiseResponse as NoiseResponse
from .noise import noise_response as noise_response
from .ood import OOD as OOD
from .ood import ood as ood
from .separation import auroc as auroc
from .separation import fpr95 as fpr95
from .shapley import modality_shapley as modality_shapley
