"""A small vision-language model (encoder, connector, causal language model) and metrics of its attention to images."""

from .grounding import PointingResult as PointingResult
from .grounding import attention_map as attention_map
from .grounding import pointing as pointing
from .vision_language_model import VisionLanguageModel as VisionLanguageModel
from .vlm_connectors import CONNECTORS as CONNECTORS
from .vlm_evaluation import evaluate_vlm as evaluate_vlm
