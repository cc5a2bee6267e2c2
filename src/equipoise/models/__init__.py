"""Models that the training loop can train."""

import importlib
from typing import TYPE_CHECKING

from .adapted import AdaptedModel as AdaptedModel
from .adapted import adapt as adapt
from .cross_modal_matcher import CrossModalMatcher as CrossModalMatcher
from .dual_encoder import DualEncoder as DualEncoder
from .fusion_model import FusionModel as FusionModel
from .self_contained import SelfContainedModel as SelfContainedModel

if TYPE_CHECKING:
    from .vision_language import VisionLanguageModel as VisionLanguageModel


def __getattr__(name: str):
    # transformers is imported only when this model is used.
    if name == "VisionLanguageModel":
        return importlib.import_module(".vision_language", __name__).VisionLanguageModel
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
