"""equipoise: see how a multimodal transformer divides its attention, and train it so that no modality is wasted."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if not TYPE_CHECKING:
    # Before all others, since it says what Ctrl-C does while they are imported.
    from . import startup as startup

from .align import GatedCrossAttention as GatedCrossAttention
from .align import InfoNCE as InfoNCE
from .align import Projector as Projector
from .align import QFormer as QFormer
from .align import QFormerLosses as QFormerLosses
from .align import Resampler as Resampler
from .align import Retrieval as Retrieval
from .align import SigLIP as SigLIP
from .align import Spliced as Spliced
from .align import TimeBias as TimeBias
from .align import TimedAttention as TimedAttention
from .align import info_nce as info_nce
from .align import modality_gap as modality_gap
from .align import recall_at_k as recall_at_k
from .align import retrieval as retrieval
from .align import siglip as siglip
from .align import splice as splice
from .align import winoground as winoground
from .attention import Attended as Attended
from .attention import attend as attend
from .attention.modular import Modular as Modular
from .attention.modular import modular_attention as modular_attention
from .attention.pseudo import Pseudo as Pseudo
from .balance import AGM as AGM
from .balance import CML as CML
from .balance import LFM as LFM
from .balance import MBSD as MBSD
from .balance import MLA as MLA
from .balance import OGM as OGM
from .balance import OGMGE as OGMGE
from .balance import OPM as OPM
from .balance import PMR as PMR
from .balance import UMT as UMT
from .balance import AMCo as AMCo
from .balance import Balancer as Balancer
from .balance import Balancing as Balancing
from .balance import Consistency as Consistency
from .balance import Exposure as Exposure
from .balance import GradientBlending as GradientBlending
from .balance import Greedy as Greedy
from .balance import MMCosine as MMCosine
from .balance import MMPareto as MMPareto
from .balance import ModalityDropout as ModalityDropout
from .balance import ProgressiveRollingQ as ProgressiveRollingQ
from .balance import ReconBoost as ReconBoost
from .balance import ReLearning as ReLearning
from .balance import RollingQ as RollingQ
from .balance import RollingStep as RollingStep
from .balance import SampleValuation as SampleValuation
from .balance import fold as fold
from .balance import rolling_query as rolling_query
from .consistency import ConsistencyLoss as ConsistencyLoss
from .consistency import consistency_score as consistency_score
from .consistency import cycle_error as cycle_error
from .consistency import effective_rank as effective_rank
from .consistency import nuclear_norm as nuclear_norm
from .consistency import supermatrix as supermatrix
from .consistency import synchronize as synchronize
from .correspondence import Correspondence as Correspondence
from .diagnose import OOD as OOD
from .diagnose import AttentionConsistency as AttentionConsistency
from .diagnose import CorruptionCurve as CorruptionCurve
from .diagnose import Cost as Cost
from .diagnose import GradientNorms as GradientNorms
from .diagnose import KeyGeometry as KeyGeometry
from .diagnose import Masking as Masking
from .diagnose import ModalityLinks as ModalityLinks
from .diagnose import NoiseResponse as NoiseResponse
from .diagnose import Quag as Quag
from .diagnose import answer_effects as answer_effects
from .diagnose import attention_consistency as attention_consistency
from .diagnose import attention_entropy as attention_entropy
from .diagnose import attention_gap as attention_gap
from .diagnose import auroc as auroc
from .diagnose import corrupt as corrupt
from .diagnose import corruption_curve as corruption_curve
from .diagnose import cost as cost
from .diagnose import energy as energy
from .diagnose import fpr95 as fpr95
from .diagnose import gap_from_attention as gap_from_attention
from .diagnose import gen_score as gen_score
from .diagnose import gradient_norms as gradient_norms
from .diagnose import key_geometry as key_geometry
from .diagnose import mask_modality as mask_modality
from .diagnose import max_logit as max_logit
from .diagnose import modality_links as modality_links
from .diagnose import modality_shapley as modality_shapley
from .diagnose import msp as msp
from .diagnose import noise_response as noise_response
from .diagnose import ood as ood
from .diagnose import quag as quag
from .diagnose import rank_collapse as rank_collapse
from .diagnose import share_spread as share_spread
from .diagnose import with_quag as with_quag
from .diagnose import without_modality as without_modality
from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import diagnose as diagnose
from .duplex import DuplexAligner as DuplexAligner
from .encoders import Backbone as Backbone
from .encoders import ConvEncoder as ConvEncoder
from .encoders import PatchEncoder as PatchEncoder
from .encoders import ResNetEncoder as ResNetEncoder
from .encoders import SequenceEncoder as SequenceEncoder
from .encoders import TextEncoder as TextEncoder
from .encoders import ViTEncoder as ViTEncoder
from .errors import EquipoiseError as EquipoiseError
from .fusion import JMT as JMT
from .fusion import MBT as MBT
from .fusion import MMML as MMML
from .fusion import MODA as MODA
from .fusion import Concat as Concat
from .fusion import FiLM as FiLM
from .fusion import Fusion as Fusion
from .fusion import Gated as Gated
from .fusion import JointAttention as JointAttention
from .fusion import MidFusion as MidFusion
from .fusion import MulT as MulT
from .fusion import Sum as Sum
from .fusion import Unimodal as Unimodal
from .fusion import modality_contributions as modality_contributions
from .geometry import rotation_between as rotation_between
from .look import Look as Look
from .look import look as look
from .model import FusionModel as FusionModel
from .space import SharedSpace as SharedSpace
from .tokens import Output as Output
from .tokens import Tokens as Tokens
from .tokens import pack as pack
from .tokens import unpack as unpack
from .transformer import Attention as Attention
from .watch import Seen as Seen
from .watch import watch as watch

if TYPE_CHECKING:
    from . import hf as hf
    from . import lightning as lightning
    from .language import PictureLanguageModel as PictureLanguageModel
    from .published import judge as judge
    from .train import load as load

__version__ = "0.1.0"

# What needs more than torch is loaded when it is first asked for: name -> module.
_LAZY = {
    "hf": ".hf", "lightning": ".lightning", "data": ".data", "record": ".record", "report": ".report",
}  # fmt: skip
# The same for single names: name -> module that has it.
_LAZY_NAMES = {"load": ".train", "judge": ".published", "PictureLanguageModel": ".language"}


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(_LAZY[name], __name__)
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(_LAZY_NAMES[name], __name__), name)
    raise AttributeError(f"module 'equipoise' has no attribute '{name}'")
