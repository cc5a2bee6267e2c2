"""Evaluates pretrained models on our benchmarks: ``emoji``, ``scenes`` and ``minimal_pairs``, and on questions."""

from .benchmark import evaluate as evaluate
from .contrastive_models import PretrainedDualEncoder as PretrainedDualEncoder
from .contrastive_models import ProcessedDataset as ProcessedDataset
from .generative_models import GenerativeVLM as GenerativeVLM
from .minimal_pair_scores import MinimalPairScores as MinimalPairScores
from .minimal_pair_scores import score_pairs as score_pairs
from .questions import QuestionResult as QuestionResult
from .questions import evaluate_questions as evaluate_questions
