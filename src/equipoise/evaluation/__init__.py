"""Evaluates pretrained models on our benchmarks: CLIP-like models on ``emoji``, generative VLMs on ``scenes``."""

from .benchmark import evaluate as evaluate
from .contrastive_models import PretrainedDualEncoder as PretrainedDualEncoder
from .contrastive_models import ProcessedDataset as ProcessedDataset
from .generative_models import GenerativeVLM as GenerativeVLM
from .questions import QuestionResult as QuestionResult
from .questions import evaluate_questions as evaluate_questions
